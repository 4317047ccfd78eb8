"""The run's report: `report.html`, one file with curves, figures, answers and what was run.

python -m train.report RUN      # written at the end of a run; at any time by this
"""

import argparse
import sys
from collections.abc import Iterable
from dataclasses import MISSING, Field, fields
from pathlib import Path

import yaml
from tqdm import tqdm

from train.card import make_card, write_card
from train.config import TrainConfig, UsageError
from train.curves import STYLE as CHARTS
from train.curves import percent, show
from train.metrics import read_log
from train.report_answers import STYLE as ANSWERS
from train.report_answers import answers_section
from train.report_charts import charts, has
from vlm.cost import CONVENTION
from vlm.page import page, text

DERIVED = ("token_budget", "patch_budget")
"""Options that count for nothing under `auto_budget`."""
STYLE = (
    CHARTS
    + ANSWERS
    + """
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.2rem, 1fr));
  gap: .75rem; margin: 1.25rem 0; }
.figures div { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: .6rem .9rem; } .figures b { display: block; font-size: 1.35rem; }
.figures small { display: block; line-height: 1.35; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr));
  gap: 0 2rem; margin: 0; background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; padding: .5rem 1rem; font-size: .925rem; }
dl.long { grid-template-columns: 1fr; }
dl div { display: grid; grid-template-columns: 13rem 1fr; gap: 1rem; padding: .25rem 0; }
dt { color: var(--quiet); } dd { margin: 0; overflow-wrap: anywhere; }
pre { font: .85rem/1.5 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
summary { cursor: pointer; color: var(--s0); margin: .75rem 0; }
@media (max-width: 40rem) { dl div { grid-template-columns: 1fr; gap: 0; } }
"""
)


def summarise(run: Path) -> None:
    """Write the card and the report of a run that has ended, and say where, or why not: whatever
    has become of its files, the training is done."""
    for name, write in (("card", write_card), ("report", write_report)):
        try:
            write(run)
        except (OSError, UsageError) as error:
            again = f"`python -m train.{name} {run}` makes it"
            print(f"no {name}: {error}; {again}", file=sys.stderr)
        else:
            if name == "report":
                print(f"report: {run / 'report.html'}")


def write_report(run: Path) -> Path:
    """Write `report.html` into a run's directory. UsageError where it is no run, or
    holds answers that are none."""
    path = run / "report.html"
    path.write_text(render(run), encoding="utf-8")
    return path


def render(run: Path) -> str:
    """The whole page, as far as the run has come."""
    card = make_card(run)
    log = read_log(run / "log.jsonl")
    trains, evals = ([x for x in log if x["event"] == event] for event in ("train", "eval"))
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    parts = [
        f'<h1>{text(card["run"])}</h1><p class="quiet">{text(_headline(card, config))}</p>',
        *(f'<p class="warning" role="note">⚠ {text(one)}</p>' for one in _warnings(card, log)),
        _tiles(card, trains, evals),
    ]
    if trains or evals:
        resumed = [start["step"] for start in card["resumed"]]
        parts.append(f'<h2>Curves</h2><div class="charts">{charts(trains, evals, resumed)}</div>')
        if resumed:
            parts.append('<p class="quiet">Dotted upright lines: the run was resumed there.</p>')
    if evals:
        parts.append(f"<h2>On held-out data</h2>{_evaluations(evals)}")
    parts += [answers_section(run / "answers.jsonl"), _provenance(card), _config(config)]
    return page(f"{card['run']}: training", "\n".join(filter(None, parts)), STYLE)


def _headline(card: dict, config: dict) -> str:
    total = f" of {card['of_steps']:,}" if card["of_steps"] else ""
    words = [f"{card['steps']:,}{total} steps", f"from {card['model']}"]
    words += _what_trains(card["trains"])
    words += [card["hardware"]] if card["hardware"] else []
    words += [config["dtype"]]
    return " · ".join(words)


def _what_trains(trains: dict[str, dict[str, int]]) -> list[str]:
    """Of the parts' counts, as the run's start has told them; nothing before it."""
    frozen = [part for part, count in trains.items() if not count["trained"]]
    words = [f"frozen: {', '.join(frozen)}"] if frozen else []
    words += [
        f"{part}: {count['trained']:,} of {count['of']:,} parameters train"
        for part, count in trains.items()
        if 0 < count["trained"] < count["of"]
    ]
    return words or ["all parts train"] * bool(trains)


def _warnings(card: dict, log: list[dict]) -> list[str]:
    """What a reader must know before believing the curves."""
    said = []
    if not any(line["event"] == "train" for line in log):
        said.append("No step has been logged yet.")
    if refused := [line["step"] for line in log if line["event"] == "refused"]:
        said.append(f"{_count(refused, 'step')} refused, with a loss or norm that was not finite.")
    if skipped := [line["step"] for line in log if line["event"] == "skipped"]:
        said.append(f"{_count(skipped, 'step')} without a target, skipped.")
    if card["bad_samples"]:
        said.append(f"{card['bad_samples']:,} bad samples were left out; ledger.jsonl names them.")
    return said


def _count(steps: list[int], what: str) -> str:
    shown = ", ".join(f"{step:,}" for step in steps[:8]) + (", …" if len(steps) > 8 else "")
    return f"{len(steps):,} {what}{'s' * (len(steps) > 1)} ({shown})"


def _tiles(card: dict, trains: list[dict], evals: list[dict]) -> str:
    """The figures that are looked for first."""
    tiles: list[tuple[str, str]] = []
    if losses := [line["loss"] for line in trains if "loss" in line]:
        tiles.append((show(losses[-1]), f"training loss, from {show(losses[0])}"))
    final = evals[-1] if evals else {}
    if "loss" in final:
        start = f", from {show(evals[0]['loss'])}" if len(evals) > 1 else ""
        tiles.append((show(final["loss"]), f"held-out loss{start}"))
        tiles.append((percent(final["token_accuracy"]), "held-out tokens right"))
    if "loss_shuffled" in final:
        gain = final["loss_shuffled"] - final["loss_true"]
        tiles.append((f"{gain:+.3f}", "held-out loss when shown another sample's image"))
    if speed := card["throughput"]:
        tiles.append((f"{speed['tokens_per_second']:,.0f}", "tokens per second"))
        tflops = show(speed["useful_tflops_per_second"])
        if speed["mfu"] is None:
            tiles.append((tflops, "useful TFLOP/s (peak not known)"))
        else:
            tiles.append((percent(speed["mfu"]), f"MFU: {tflops} useful TFLOP/s"))
        tiles.append((tqdm.format_interval(speed["training_seconds"]), "training time"))
    boxes = "".join(f"<div><b>{text(v)}</b><small>{text(what)}</small></div>" for v, what in tiles)
    return f'<div class="figures">{boxes}</div>' if tiles else ""


def _evaluations(evals: list[dict]) -> str:
    columns = [
        ("loss", "Loss", show),
        ("token_accuracy", "Tokens right", percent),
        ("loss_true", "Own image", show),
        ("loss_shuffled", "Another's", show),
        ("loss_blank", "Blank", show),
        ("text_loss", "Text alone", show),
        ("n", "Samples", str),
    ]
    columns = [column for column in columns if any(has(line, column[0]) for line in evals)]
    head = "".join(f'<th scope="col">{title}</th>' for _, title, _ in columns)
    rows = "".join(
        f'<tr><th scope="row">{line["step"]:,}</th>'
        + "".join(
            f"<td>{unit(line[key]) if has(line, key) else '–'}</td>" for key, _, unit in columns
        )
        + "</tr>"
        for line in evals
    )
    return (
        f'<div class="wide"><table><thead><tr><th scope="col">Step</th>{head}</tr></thead><tbody>'
        f"{rows}</tbody></table></div>"
        '<p class="quiet">“Own image”, “another’s” and “blank” are the losses of the samples with '
        "images when each is shown its own, another sample’s or a grey one: a model that looks is "
        "best with its own.</p>"
    )


def _facts(rows: Iterable[tuple[str, object]], kind: str = "") -> str:
    """Names and values, those left out that are not there."""
    body = "".join(
        f"<div><dt>{text(name)}</dt><dd>{text(_plain(value))}</dd></div>"
        for name, value in rows
        if value not in (None, [], {})
    )
    return f'<dl class="{kind}">{body}</dl>'


def _plain(value: object) -> str:
    """As YAML writes it, lists with commas alone."""
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _provenance(card: dict) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in (card["versions"] or {}).items())
    resumed = "; ".join(f"at step {r['step']:,} ({r['time']})" for r in card["resumed"])
    budget = card["micro_batch_budget"] or {}
    rows = [
        ("command", card["command"]),
        ("started", card["started"]),
        ("resumed", resumed or None),
        ("hardware", card["hardware"]),
        ("micro-batch", ", ".join(f"{most:,} {what}" for what, most in budget.items()) or None),
        ("code", card["revision"]),
        ("versions", versions or None),
        ("model", card["model"]),
        ("data", card["data_fingerprint"]),
        ("config", card["config_sha256"]),
        ("last checkpoint", card["checkpoint"]),
    ]
    return f"<h2>What was run</h2>{_facts(rows, 'long')}"


def _config(config: dict) -> str:
    """Options that differ from their defaults; all of them on demand."""
    defaults = {field.name: field for field in fields(TrainConfig)}
    changed = {
        name: value
        for name, value in config.items()
        if name not in defaults or value != _default(defaults[name])
        if not (config.get("auto_budget") and name in DERIVED)
    }
    return (
        f"<h2>Options</h2>{_facts(changed.items())}"
        f"<details><summary>All {len(config)} options</summary>"
        f'<div class="wide"><pre>{text(yaml.safe_dump(config, sort_keys=False))}</pre></div>'
        "</details>"
        f'<p class="quiet">{text(CONVENTION[0].upper() + CONVENTION[1:])}.</p>'
    )


def _default(field: Field) -> object:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return None if field.default is MISSING else field.default


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m train.report", description=__doc__)
    parser.add_argument("run", type=Path, help="its directory")
    options = parser.parse_args(arguments)
    try:
        print(f"written: {write_report(options.run)}")
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
