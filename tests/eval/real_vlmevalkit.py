"""What the tests of VLMEvalKit itself share: it is asked in its own environment."""

from dataclasses import replace
from pathlib import Path

import pytest

from eval import vlmevalkit
from eval.benchmarks import Benchmark, load
from eval.options import Options
from eval.result import Result, SampleResult

FIXTURES = Path(__file__).parent / "fixtures"
PATCHED = (str(FIXTURES / "patched_worker.py"),)
"""The worker, but it takes the tables of a test for those that the library knows."""
NEEDED = [
    pytest.mark.slow,
    pytest.mark.skipif(not vlmevalkit.PYTHON.exists(), reason="needs make eval_vlmevalkit"),
]


def ask(
    server, tmp_path: Path, benchmark: str | Benchmark, worker=PATCHED, **changes
) -> tuple[Result, dict[str, SampleResult]]:
    """The data in `tmp_path`/data, the result in `tmp_path`/result; its samples by their id."""
    options = Options(
        api_base=f"{server.url}/v1",
        model="fake-vl",
        checkpoint="mine",
        folder=tmp_path / "result",
        data_root=tmp_path / "data",
        retries=0,
    )
    benchmark = load(benchmark) if isinstance(benchmark, str) else benchmark
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vlmevalkit, "WORKER", worker)
        result, samples = vlmevalkit.run(benchmark, replace(options, **changes))
    return result, {sample.id: sample for sample in samples}
