"""Serve the trained model with vLLM, ask it held-out questions, and compare with our own answers.

    python -m examples.digits.serve --model CHECKPOINT --export DIR --data DATA --out served.json

The server is `serve/launch.py`'s, the client OpenAI's, and the other side our own generation on
the checkpoint that was exported: what was trained is what is served.
"""

import argparse
import json
import socket
import sys
from pathlib import Path

from serve.batch import split_label
from serve.conversation import Sampling
from serve.endpoint import Endpoint
from serve.launch import running_server
from serve.local import Local
from serve.serve_config import ServeConfig
from vlm.data.formats import parse_line
from vlm.data.formats.context import RowContext
from vlm.data.schema import Sample

QUESTIONS = 10
SAMPLING = Sampling(max_new_tokens=16)


def held_out(data: Path) -> tuple[list[Sample], list[str]]:
    """The first held-out questions, and their true answers."""
    file = data / "held_out.jsonl"
    lines = file.read_bytes().splitlines()[:QUESTIONS]
    pairs = [
        split_label(parse_line(line, f"{n}", RowContext(data)))
        for n, line in enumerate(lines, start=1)
    ]
    return [sample for sample, _ in pairs], [truth for _, truth in pairs]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("model", "export", "data", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    options = parser.parse_args()
    samples, truths = held_out(options.data)
    local = dict(Local(options.model).ask_many(samples, SAMPLING, QUESTIONS))
    config = ServeConfig(
        model=options.export,
        port=free_port(),
        served_model_name="digits",
        max_model_len=2048,
        log=options.out.with_suffix(".log"),
    )
    print(f"starting vLLM on {options.export} (its words are in {config.log})", flush=True)
    with running_server(config) as url:
        served = dict(Endpoint(url).ask_many(samples, SAMPLING, QUESTIONS))
    rows = []
    for sample, truth in zip(samples, truths, strict=True):
        question = sample.messages[-1].content.replace("\n", " ")
        answers = {"local": local[sample.id].text, "served": served[sample.id].text}
        rows.append({"question": question, "truth": truth, **answers})
        print(f"{question}  truth {truth!r}, local {answers['local']!r}, {answers['served']!r}")
    equal = sum(row["local"] == row["served"] for row in rows)
    right = sum(row["served"] == row["truth"] for row in rows)
    result = {"questions": len(rows), "served_equals_local": equal, "right": right, "rows": rows}
    options.out.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    print(f"{equal} of {len(rows)} served answers equal our own; {right} are right")
    return 0 if equal == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
