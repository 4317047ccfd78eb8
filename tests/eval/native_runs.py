"""Runs of the native backend, and the one of MMMU whose outcome is known."""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

from eval import native
from eval.benchmarks import Benchmark, load
from eval.options import Options
from eval.result import Result, SampleResult
from tests.eval import families
from tests.eval.known_endpoint import knowing

MMMU = replace(load("mmmu"), subsets=["Art", "Math"])
MMMU_ANSWERS = {
    "no. 1?": "ANSWER: A",
    "no. 2?": "It is red.\nANSWER: C",  # wrong
    "no. 3?": "<think>ANSWER: A?</think>\n\nANSWER: C",
    "no. 4?": "I do not know",  # unparsable
    "no. 5?": {"content": "Let me think", "finish_reason": "length"},
    "no. 6?": "**Answer: (B)**",
    "no. 7?": "ANSWER: C, not B",
    "no. 8?": "ANSWER: 42",
    "no. 9?": "that is,\u2028ANSWER: 0.5",  # what some readers take for the end of a line
}
"""Right: 1 and 3 of four in Art; 6, 7, 8 and 9 of five in Math."""
ROUNDED = 0.005
"""The library gives percentages with two decimals."""


def ask(
    server, root: Path, benchmark: Benchmark, **changes
) -> tuple[Result, dict[int, SampleResult]]:
    """A result, and its samples by number."""
    options = Options(
        api_base=f"{server.url}/v1",
        model="fake-vl",
        checkpoint="mine",
        folder=root / "result",
        data_root=root / "data",
        retries=0,
    )
    result, samples = native.run(benchmark, replace(options, **changes))
    return result, {no_of(sample.question): sample for sample in samples}


def no_of(request: object) -> int:
    text = request if isinstance(request, str) else json.dumps(request)
    return int(re.search(r"no\. (\d+)\?", text)[1])


def numbers(server) -> list[int]:
    return sorted(map(no_of, server.requests))


def own_choices(**changes) -> Benchmark:
    about = {"name": "own", "title": "Own", "source": "none", "licence": "none", "size": None}
    settings = {"metric": "accuracy", "native": "general_vmcq", "subsets": ["mine"]}
    return Benchmark(**about | settings | changes)


@dataclass(frozen=True)
class Whole:
    """An uninterrupted run of MMMU."""

    data_root: Path
    """Nothing is written to it."""
    result: Result
    samples: dict[int, SampleResult]
    requests: list[dict]

    def is_what_came(self, result: Result, samples: dict[int, SampleResult]) -> bool:
        """The same but for the time it took."""
        return replace(result, seconds=self.result.seconds) == self.result and (
            samples == self.samples
        )


def whole_mmmu(folder: Path) -> Whole:
    families.mmmu(folder / "data")
    with knowing(MMMU_ANSWERS) as server:
        result, samples = ask(server, folder, MMMU)
    return Whole(folder / "data", result, samples, server.requests)
