"""What trains, as the cost functions are told it: a collection of names, `trains`.

It holds the parts of which anything trains. Beside a part of which not all trains stand the names
of the parameters that do:

    {"aligner"}                                                   the whole merger
    {"aligner", "llm", "lm_head.weight"}                          and of the decoder the head alone
"""

from collections.abc import Collection

PARTS = ("vit", "aligner", "llm")
"""What can be trained or frozen; `aligner` is the merger."""


def part_of(name: str) -> str:
    """The part that a parameter belongs to; the merger lives under `visual.`, yet is its own."""
    if name.startswith("model.visual.merger."):
        return "aligner"
    return "vit" if name.startswith("model.visual.") else "llm"


def names_of(trained: Collection[str], everything: Collection[str]) -> frozenset[str]:
    """`trains`, from the names of the parameters that train and of all there are."""
    frozen = {part_of(name) for name in set(everything) - set(trained)}
    parts = {part_of(name) for name in trained}
    return frozenset(parts | {name for name in trained if part_of(name) in frozen})


def any_trains(prefix: str, trains: Collection[str]) -> bool:
    """Whether a parameter trains whose name begins like this."""
    part = part_of(prefix)
    named = [name for name in trains if name not in PARTS and part_of(name) == part]
    return any(name.startswith(prefix) for name in named) if named else part in trains
