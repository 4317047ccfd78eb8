"""The model card of an export: what it is, how it was trained, on what, and what it cannot do.

Facts come from files that are there: the graft's report, and for each stage the run's
`config.yaml`, `log.jsonl` and `trainer.json` (`serve/source.py`).
"""

import re
from importlib.metadata import version
from pathlib import Path

from serve.export_files import LITERAL_NOTE, STOCK_WARNING, Format
from vlm.config import VLMConfig
from vlm.cost import parameter_counts
from vlm.data.limits import Limits
from vlm.hf_config import ConfigError, read_json

LOG_LINES_AVERAGED = 5

FRONT_MATTER = """---
library_name: transformers
pipeline_tag: image-text-to-text
tags:
- graftvl
- vision-language
---
"""
USE = """## Use

```python
from PIL import Image
from transformers import pipeline

pipe = pipeline("image-text-to-text", model="{name}"{trust})
message = {{"role": "user", "content": [
    {{"type": "image", "image": Image.open("cat.jpg").convert("RGB")}},
    {{"type": "text", "text": "What is in this picture?"}}]}}
print(pipe(text=[message], max_new_tokens=128, return_full_text=False)[0]["generated_text"])
```

Made and checked with transformers {transformers}. With vLLM: {vllm}
"""
PLUGIN = (
    "`python serve/launch.py {name}` in a\ncheckout of GraftVL, after `make install` or "
    "`pip install .` there."
)
STOCK_USE = """## Use

`vllm serve {name}`, without a plugin. {warning}
"""


def model_card(
    name: str,
    source: Path,
    config: VLMConfig,
    limits: Limits,
    format: Format,
    stages: list[dict],
    results: Path | None = None,
) -> str:
    """README.md with the hub's front matter.

    Args:
        results: a directory of eval/run.py's results for this model.
    """
    report = source / "graft_report.json"
    graft = read_json(report) if report.exists() else {}
    if format == "vllm_stock":
        use = STOCK_USE.format(name=name, warning=STOCK_WARNING)
    else:
        literal = format == "stock"
        use = USE.format(
            name=name,
            trust="" if literal else ", trust_remote_code=True",
            transformers=version("transformers"),
            vllm=f"`vllm serve {name}`, without a plugin.\n\n{LITERAL_NOTE}"
            if literal
            else PLUGIN.format(name=name),
        )
    parts = [FRONT_MATTER, f"# {name}\n", _what(config, graft), use]
    parts += [_training(stages), _scores(results), _limits(config, limits, stages)]
    return "\n".join(part for part in parts if part)


def _what(config: VLMConfig, graft: dict) -> str:
    counts = parameter_counts(config)
    text = config.text
    lines = [
        "A vision tower and patch merger of the Qwen2.5-VL kind on a Qwen3 language model, put "
        "together and trained with GraftVL.\n",
        "| part | |",
        "|---|---|",
    ]
    if graft:
        for what, donor in (("vision tower", "vision"), ("language model", "llm")):
            lines.append(f"| {what} from | `{donor_name(graft['donors'][donor]['path'])}` |")
    lines += [f"| parameters, {part} | {count:,} |" for part, count in counts.items()]
    lines += [
        f"| decoder | {text.num_hidden_layers} layers, hidden size {text.hidden_size}, "
        f"{text.num_attention_heads} heads of {text.head_dim}, {text.num_key_value_heads} "
        f"key/value heads, {'QK-norm' if text.qk_norm else 'no QK-norm, biases on q, k and v'} |",
        f"| head | {'tied to the embedding' if text.tie_word_embeddings else 'untied'} |",
        "",
    ]
    return "\n".join(lines)


def _training(stages: list[dict]) -> str:
    if not stages:
        return (
            "## Training\n\nNone is on record: this is a graft as it was built, or its run's "
            "directory was not there when it was exported.\n"
        )
    header = "stage | trained | data | samples | steps | global batch | learning rate | loss"
    lines = ["## Training\n", f"| {header} |", "|" + "---|" * 8]
    for number, stage in enumerate(stages, start=1):
        config, progress = stage["config"], stage["progress"]
        trained = [p for p in ("vit", "aligner", "llm") if not config[f"freeze_{p}"]]
        last = stage["log"][-LOG_LINES_AVERAGED:]
        loss = f"{sum(e['loss'] for e in last) / len(last):.4f}" if last else "not logged"
        data = ", ".join(f"`{Path(path).name}`" for path in config["dataset"])
        row = (
            *(number, ", ".join(trained), data, f"{progress['samples']:,}"),
            *(f"{progress['updates']:,}", progress["global_batch_size"], _rates(config), loss),
        )
        lines.append("| " + " | ".join(map(str, row)) + " |")
    lines.append(
        f"\nThe loss is the mean of the last {LOG_LINES_AVERAGED} logged steps on training data; "
        "it is no measure of quality.\n"
    )
    return "\n".join(lines)


def _scores(results: Path | None) -> str:
    """The complete results of benchmarks, as eval/run.py wrote them."""
    if results is None:
        return "## Scores\n\nNone were given to the exporter.\n"
    found = [read_json(path) for path in sorted(results.rglob("result.json"))]
    complete = [result for result in found if result.get("complete")]
    if not complete:
        raise ConfigError(f"{results} holds no complete result.json of eval/run.py")
    lines = ["## Scores\n", "| benchmark | metric | score | n | by |", "|" + "---|" * 5]
    lines += [
        f"| {r['benchmark']} | {r['metric']} | {r['score']:.2f} | {r['n']:,} | "
        f"{r['backend']}, {r['backend_version']} |"
        for r in complete
    ]
    notes = [f"- {r['benchmark']}: {note}" for r in complete for note in r["notes"]]
    return "\n".join([*lines, "", *notes, *[""] * bool(notes)])


def _rates(config: dict) -> str:
    rates = [f"{config['learning_rate']:g}"]
    rates += [f"{p} {config[f'{p}_lr']:g}" for p in ("vit", "aligner") if config.get(f"{p}_lr")]
    return ", ".join(rates)


def _limits(config: VLMConfig, limits: Limits, stages: list[dict]) -> str:
    trained = stages[-1]["config"].get("max_length") if stages else None
    longest = f" trained on samples of up to {trained:,} tokens" if trained else " not trained here"
    return f"""## Limits

- Images are resized to {limits.min_pixels:,} to {limits.max_pixels:,} pixels, frames of a video to
  {limits.video_min_pixels:,} to {limits.video_max_pixels:,}, {limits.fps:g} frames a second and at
  most {limits.fps_max_frames} of them.
- Positions up to {config.text.max_position_embeddings:,};{longest}.
- It may state what is not in the picture, and has whatever biases its donors and data have. It was
  not trained to refuse.
- The donors' licences and that of the data apply.
"""


def donor_name(path: str) -> str:
    """A donor's directory name, or its id in a hub's cache: an owner's folder says nothing."""
    snapshot = re.search(r"models--(.+?)--(.+?)/snapshots/(\w{7})", path)
    return f"{snapshot[1]}/{snapshot[2]}@{snapshot[3]}" if snapshot else Path(path).name
