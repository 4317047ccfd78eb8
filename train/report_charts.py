"""What the report draws of a log. A new figure in `log.jsonl` becomes a curve here."""

from collections.abc import Sequence
from dataclasses import replace

from train.curves import COLORS, Series, chart, percent, show

MOST_SOURCES = COLORS
"""Curves in one picture."""


def charts(trains: list[dict], evals: list[dict], resumed: Sequence[int]) -> str:
    """Figures in the order in which they matter; none of what was not measured.

    Args:
        trains, evals: the lines of these events.
        resumed: steps at which the run was started again.
    """
    groups = list(trains[-1]["lr"]) if trains else []
    parts = list(dict.fromkeys(map(_part, groups)))

    def by_group(key: str) -> list[Series]:
        """A part has one colour in all pictures; without weight decay its line is dotted."""
        looks = [(parts.index(_part(g)) % COLORS, 2 * g.endswith("no_decay")) for g in groups]
        series = zip(_by(trains, key, groups), looks, strict=True)
        return [replace(s, look=look) for s, look in series]

    # the groups of a part share one rate
    of_parts = {_part(series.name): series.points for series in by_group("lr")}
    rates = [
        Series(part, points, (place % COLORS, 0))
        for place, (part, points) in enumerate(of_parts.items())
    ]
    norm = replace(_of(trains, "grad_norm", "all"), look=(len(parts) % COLORS, 0))
    shown = [("loss_true", "its own"), ("loss_shuffled", "another's"), ("loss_blank", "blank")]
    waits = [("data_wait", "data"), ("rank_wait", "slowest rank"), ("save_wait", "checkpoints")]
    right = [_of(trains, "token_accuracy", "training"), _of(evals, "token_accuracy", "held out")]
    pictures: list[tuple] = [
        ("Loss", [_of(trains, "loss", "training"), _of(evals, "loss", "held out")]),
        ("Held-out loss by image shown", [_of(evals, key, name) for key, name in shown]),
        ("Target tokens right", right, percent, True),
        ("Loss on text alone", [_of(evals, "text_loss")]),
        ("Training loss by source", _by_source(trains)),
        ("Held-out loss by source", _by_source(evals)),
        ("Learning rate", rates, show, True),
        ("Gradient norm, before clipping", [norm, *by_group("grad_norm_by_group")]),
        ("Update / weight ratio", by_group("update_ratio_by_group")),
        ("Tokens per second", [_of(trains, "tokens_per_second")], show, True),
        ("MFU", [_of(trains, "mfu")], percent, True),
        ("Time spent waiting for", [_of(trains, key, name) for key, name in waits], percent, True),
    ]
    return "".join(chart(*picture, marks=resumed) for picture in pictures)


def has(line: dict, key: str) -> bool:
    """Whether a line has this figure."""
    return isinstance(line.get(key), int | float)


def _of(lines: list[dict], key: str, name: str = "") -> Series:
    return Series(name, [(line["step"], line[key]) for line in lines if has(line, key)])


def _by(lines: list[dict], key: str, names: Sequence[str]) -> list[Series]:
    """A figure that lines hold by name."""
    return [
        Series(name, [(x["step"], x[key][name]) for x in lines if name in x.get(key, {})])
        for name in names
    ]


def _by_source(lines: list[dict]) -> list[Series]:
    """The losses of several sources; of a single one there is nothing more to say."""
    names = dict.fromkeys(name for line in lines for name in line.get("loss_by_source", {}))
    return _by(lines, "loss_by_source", list(names)[:MOST_SOURCES]) if len(names) > 1 else []


def _part(group: str) -> str:
    return group.split("/")[0]
