"""The recipe in miniature, from two donors to a scored model: `make demo`.

python -m examples.digits.run [--out runs/digits] [--fresh] [--variant literal]

Every phase is the real command of the 8B recipe. Donors and data are kept and used again; the
phases after them run anew, and their old results are removed first. With `--variant literal` the
recipe's own surgery, which drops QK-norm, is run beside the exact one, with the same donors, data
and stages, and the report says what it costs.
"""

import argparse
import json
import shutil
import time
from contextlib import contextmanager
from pathlib import Path

from examples.digits.donors import train_side_by_side
from examples.digits.make_data import make_data
from examples.digits.processes import ROOT, run
from examples.digits.recipe import Recipe
from examples.digits.report import write_report
from examples.digits.score import chance, language_model_loss, read_rows, top1_agreement

BENCHMARK_ROWS = 200


class Demo:
    """The phases, the folder that holds them, and how long each took."""

    def __init__(self, out: Path, with_literal: bool = False) -> None:
        self.out, self.with_literal = out, with_literal
        self.seconds: dict[str, float] = {}
        self.data, self.donors = out / "data", out / "donors"
        self.exact = Recipe(out, self.data, self.donors)
        self.literal = Recipe(out / "literal", self.data, self.donors, "literal")
        self.exports, self.results = out / "exports", out / "results"

    @contextmanager
    def phase(self, name: str, what: str):
        print(f"\n=== {name}: {what}", flush=True)
        began = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - began, 1)
        print(f"=== {name} took {self.seconds[name]:.0f} s", flush=True)

    def make(self) -> dict:
        """Run all phases; returns the report."""
        for old in ("graft", "stage1", "stage2", "exports", "results", "literal"):
            shutil.rmtree(self.out / old, ignore_errors=True)
        if not self.data.exists():
            with self.phase("data", "boards of handwritten digits, and questions about them"):
                make_data(self.data)
        with self.phase("donors", "a tower that knows digits, a language model that knows text"):
            train_side_by_side(self.donors)
        with self.phase("graft", "join them with a fresh merger"):
            graft = self.exact.graft()
        with self.phase("verify", "on text the hybrid equals its language donor"):
            proof = self.out / "proof.json"
            llm = ("--llm", self.donors / "llm", "--json", proof)
            run("-m", "vlm.graft", "verify", "--model", graft, *llm)
        with self.phase("stage1", "the merger alone"):
            stage1 = self.exact.train("stage1", graft)
        with self.phase("stage2", "everything"):
            stage2 = self.exact.train("stage2", stage1)
        models = {"graft": graft, "stage1": stage1, "stage2": stage2}
        with self.phase("chat", "ask the trained model about an unseen board"):
            self.chat(stage2)
        with self.phase("score", "every checkpoint answers the held-out questions"):
            scores = self.exact.score(models)
        literal = self.run_literal() if self.with_literal else {}
        with self.phase("export", "directories that transformers and vLLM load"):
            for name, model in models.items():
                run("serve/export.py", model, "--out", self.exports / name)
        with self.phase("parity", "our model, transformers and vLLM on the same requests"):
            run("serve/parity.py", self.exports / "stage2", "--json", self.out / "parity.json")
        with self.phase("serve", "vLLM answers held-out questions as our own generation does"):
            files = ("--data", self.data, "--out", self.out / "served.json")
            pair = ("--model", stage2, "--export", self.exports / "stage2")
            run("-m", "examples.digits.serve", *pair, *files)
        with self.phase("eval", "every checkpoint through vLLM and EvalScope"):
            self.evaluate(models)
        return self.report(json.loads(proof.read_text()), scores, literal)

    def run_literal(self) -> dict[str, dict]:
        """Graft, stages and scores of the literal variant; returns the scores."""
        with self.phase("literal", "the recipe's own surgery, and the same two stages"):
            graft = self.literal.graft()
            stage1 = self.literal.train("stage1", graft)
            stage2 = self.literal.train("stage2", stage1)
            return self.literal.score({"graft": graft, "stage1": stage1, "stage2": stage2})

    def chat(self, model: Path) -> None:
        row = read_rows(self.data / "held_out.jsonl")[0]
        question = row["messages"][0]["content"].replace("<image>", "")
        images = [part for f in row["images"] for part in ("--image", self.data / f)]
        print(f"{row['images']} {question.strip()} (truth: {row['messages'][1]['content']})")
        run("serve/chat.py", model, *images, "--prompt", question)

    def evaluate(self, models: dict[str, Path]) -> None:
        """The first held-out questions as a benchmark; a table, and stage 1 against stage 2."""
        questions = self.data / "benchmark.jsonl"
        rows = (self.data / "held_out.jsonl").read_text(encoding="utf-8").splitlines(True)
        questions.write_text("".join(rows[:BENCHMARK_ROWS]), encoding="utf-8")
        for name in models:
            run(
                *("eval/run.py", "examples/digits/digits.yaml", "--data_root", questions),
                *("--serve", self.exports / name, "--results", self.results),
            )
        run("eval/table.py", self.results, "--out", self.out / "table")
        stages = [self.results / name / "digits" for name in ("stage1", "stage2")]
        run("eval/compare.py", *stages, "--out", self.out / "comparison")

    def compare(self, scores: dict[str, dict], literal: dict[str, dict]) -> dict[str, dict]:
        """Both variants' figures after each step, and how often each graft's most likely next
        token of a text is the language donor's."""
        kept = ("exact_match", "loss", "text_loss")
        text = read_rows(self.data / "held_out_text.jsonl")
        compared = {}
        for recipe, found in ((self.exact, scores), (self.literal, literal)):
            figures = {name: {key: score[key] for key in kept} for name, score in found.items()}
            agreement = top1_agreement(recipe.graft_dir, self.donors / "llm", text)
            compared[recipe.variant] = figures | {"top1_agreement": agreement}
        return compared

    def report(self, proof: dict, scores: dict[str, dict], literal: dict[str, dict]) -> dict:
        rows = read_rows(self.data / "held_out.jsonl")
        text_rows = read_rows(self.data / "held_out_text.jsonl")
        llm_loss = language_model_loss(self.donors / "llm", text_rows)
        values = {
            "text_proof_max_abs_delta": proof["max_abs_delta"],
            "text_proof_vs_transformers": proof["witness_max_abs_delta"],
            "questions": len(rows),
            "exact_match": {"chance": chance(rows)}
            | {name: score["exact_match"] for name, score in scores.items()},
            "loss": {name: score["loss"] for name, score in scores.items()},
            "text_loss": {
                "llm": llm_loss,
                "graft": scores["graft"]["text_loss"],
                "stage2": scores["stage2"]["text_loss"],
            },
            "by_inverted": {name: score["by_inverted"] for name, score in scores.items()},
            "trainable_parameters": {
                s: trained_parameters(self.out / s) for s in scores_of(scores)
            },
            "parity": json.loads((self.out / "parity.json").read_text()),
            "served": json.loads((self.out / "served.json").read_text()),
            "benchmark": benchmark_scores(self.results, scores, rows),
            "variants": self.compare(scores, literal) if literal else {},
            "seconds": self.seconds,
        }
        answers = {name: score["answers"] for name, score in scores.items()}
        write_report(self.out, values, rows, answers, self.data)
        return values


def benchmark_scores(results: Path, scores: dict[str, dict], rows: list[dict]) -> dict[str, dict]:
    """EvalScope's figure of every checkpoint, and the local scorer's on the same questions."""
    truths = [row["messages"][-1]["content"] for row in rows[:BENCHMARK_ROWS]]
    figures = {}
    for name, score in scores.items():
        result = json.loads((results / name / "digits" / "result.json").read_text())
        answers = score["answers"][: len(truths)]
        right = sum(map(str.__eq__, answers, truths))
        lines = (results / name / "digits" / "samples.jsonl").read_text().splitlines()
        served = {sample["id"]: sample["raw"] for sample in map(json.loads, lines)}
        differ = sum(served[f"default/{n}"] != answer for n, answer in enumerate(answers))
        figures[name] = {
            "n": result["n"],
            "evalscope": result["score"],
            "local": 100 * right / len(truths),
            "answers_that_differ": differ,
        }
    return figures


def scores_of(scores: dict[str, dict]) -> list[str]:
    """The checkpoints that a stage trained."""
    return [name for name in scores if name.startswith("stage")]


def trained_parameters(run_dir: Path) -> int:
    """Parameters whose masters the run's checkpoint holds."""
    from safetensors import safe_open

    latest = run_dir / (run_dir / "latest").read_text().strip()
    total = 0
    for path in (latest / "engine").glob("rank-*.safetensors"):
        with safe_open(path, framework="pt") as file:
            masters = [key for key in file.keys() if "|master|" in key]  # noqa: SIM118
            total += sum(file.get_slice(key).get_shape()[0] for key in masters)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "digits")
    parser.add_argument("--fresh", action="store_true", help="also make donors and data anew")
    parser.add_argument(
        "--variant",
        choices=("exact", "literal"),
        default="exact",
        help="literal: run the literal recipe beside the exact one and compare them",
    )
    options = parser.parse_args()
    out = options.out.resolve()
    if options.fresh:
        shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    Demo(out, with_literal=options.variant == "literal").make()
    print(f"\nall of it took {time.monotonic() - began:.0f} s; the report is {out}/report.md")


if __name__ == "__main__":
    main()
