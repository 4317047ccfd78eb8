"""EvalScope's native backend: its config is built, its output is read, the scoring is its own."""

import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path

from eval.benchmarks import Benchmark
from eval.native_samples import read_samples, recording, shorten, without_keys
from eval.options import Options
from eval.result import EvalError, Result, SampleResult, data_hash

OWN_DATA = "graftvl_custom"
CACHE = "cache"
"""What the library unpacks of local data; gone when the run ends."""
ASKED = "asked.txt"
"""Hash of the data that a run was begun with: the library knows an answer by its number alone."""


def run(benchmark: Benchmark, options: Options) -> tuple[Result, list[SampleResult]]:
    """Ask, score and read back.

    Raises:
        EvalError: data or settings that cannot be used. A server that fails is no error here: its
            samples are in the result, without a score.
    """
    from evalscope import TaskConfig, run_task

    from eval import custom  # noqa: F401 - registers our own adapter

    quiet()
    began = time.monotonic()
    settings = task_settings(benchmark, options)
    cut_torn_lines(options.backend_folder)
    with (
        recording(benchmark.native, options.backend_folder / ASKED) as recorder,
        cache_of_its_own(options) if options.data_root else nullcontext(),
    ):
        try:
            report = run_task(TaskConfig(**settings))[benchmark.native]
        except EvalError:
            raise
        except Exception as error:
            raise EvalError(
                f"EvalScope could not run {benchmark.native}: {shorten(error)}"
            ) from error
    if not report:
        raise EvalError(f"{benchmark.name} has no samples; is its data in the layout it expects?")
    samples = read_samples(options, benchmark, recorder)
    for log in (options.backend_folder / "logs").glob("*.log"):
        log.write_text(without_keys(log.read_text(encoding="utf-8"), options), encoding="utf-8")
    return summarise(benchmark, options, report, samples, time.monotonic() - began), samples


def task_settings(benchmark: Benchmark, options: Options) -> dict:
    """Arguments of EvalScope's TaskConfig."""
    # Thoughts that a server leaves in the answer are no part of what is scored.
    dataset = {"filters": {"remove_until": "</think>"}, **benchmark.dataset_args}
    if benchmark.subsets is not None:
        dataset["subset_list"] = benchmark.subsets
    if benchmark.prompt is not None:
        dataset["prompt_template"] = benchmark.prompt
    data = local_data(benchmark, options)
    if data is not None:
        dataset["local_path"] = str(data)
    settings = {
        "model": options.model,
        "model_id": options.checkpoint,
        "api_url": options.api_base,
        "api_key": options.api_key,
        "eval_type": "openai_api",
        "datasets": [benchmark.native],
        "dataset_args": {benchmark.native: dataset},
        "generation_config": {
            "temperature": benchmark.temperature,
            "max_tokens": benchmark.max_tokens,
            "timeout": options.timeout,
            "retries": options.retries + 1,  # it counts tries
            "retry_interval": 1,
            "extra_body": extra_body(benchmark),
        },
        "model_args": {"max_retries": 0},  # the client would multiply the library's own tries
        "eval_batch_size": options.concurrency,
        "limit": options.limit,
        "work_dir": str(options.backend_folder),
        "no_timestamp": True,
        "ignore_errors": True,
        "judge": judge_settings(benchmark, options),
    }
    if data is not None:
        settings["dataset_dir"] = str(options.backend_folder / CACHE)
    if options.resume and (options.backend_folder / "predictions").is_dir():
        settings["use_cache"] = str(options.backend_folder)
        # Answers are kept, scores are made anew: else the library refuses an endpoint that moved
        # to another port, and keeps what a judge failed to score.
        settings["rerun_review"] = True
    return settings


def cut_torn_lines(folder: Path) -> None:
    """A crash may leave half a line; the next one would be written behind it, and both be lost."""
    for path in (folder / "predictions").rglob("*.jsonl"):
        with path.open("rb+") as file:
            whole = sum(len(line) for line in file if line.endswith(b"\n"))
            file.truncate(whole)


@contextmanager
def cache_of_its_own(options: Options) -> Iterator[None]:
    """`datasets` and the library cache local files by the names of their folders alone.

    From a cache that lasts they would go on giving what was there before a download was completed
    or a file replaced.
    """
    import datasets

    before = datasets.config.HF_DATASETS_CACHE
    folder = options.backend_folder / CACHE
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
    datasets.config.HF_DATASETS_CACHE = folder
    try:
        yield
    finally:
        datasets.config.HF_DATASETS_CACHE = before
        shutil.rmtree(folder, ignore_errors=True)


def extra_body(benchmark: Benchmark) -> dict:
    """What a request says beside OpenAI's own fields."""
    if benchmark.thinking is None:
        return {}
    return {"chat_template_kwargs": {"enable_thinking": benchmark.thinking}}


def judge_settings(benchmark: Benchmark, options: Options) -> dict:
    if options.judge is None:
        return {"strategy": "rule"} if benchmark.judge != "none" else {}
    model = {"model_id": options.judge.model, "api_url": options.judge.api_base}
    return {"strategy": "llm", "models": [model | {"api_key": options.judge.api_key}]}


def local_data(benchmark: Benchmark, options: Options) -> Path | None:
    """The benchmark's folder below data_root; None where the library shall download it."""
    if options.data_root is None and benchmark.hub_id is None:
        raise EvalError(f"{benchmark.name} has no data of its own; name a file with --data_root")
    if options.data_root is None or options.data_root.is_file():
        return options.data_root
    names = [benchmark.name, benchmark.native]
    names += [benchmark.hub_id, benchmark.hub_id.rpartition("/")[2]] if benchmark.hub_id else []
    for name in dict.fromkeys(names):
        if (options.data_root / name).exists():
            return options.data_root / name
    looked = ", ".join(dict.fromkeys(names))
    raise EvalError(
        f"{options.data_root} has no data of {benchmark.name} (looked for {looked}); "
        "docs/evaluation.md says where each benchmark's data comes from"
    )


def summarise(
    benchmark: Benchmark, options: Options, report, samples: list[SampleResult], seconds: float
) -> Result:
    """The library's figures as a Result; its score stands only where every sample has one."""
    errored = sum(sample.error is not None for sample in samples)
    answered = [sample for sample in samples if sample.error is None]
    score, subsets = None, {}
    if samples and not errored:
        metric = pick_metric(benchmark, report)
        score = metric.score * benchmark.scale
        subsets = {
            subset.name: {"score": subset.score * benchmark.scale, "n": subset.num}
            for category in metric.categories
            for subset in category.subsets
            if not subset.is_aggregate
        }
    unparsed = sum(sample.extracted is None for sample in answered)
    truncated = sum(sample.truncated for sample in answered)
    return Result(
        benchmark=benchmark.name,
        checkpoint=options.checkpoint,
        model=options.model,
        weights=options.weights,
        size=benchmark.size,
        backend="native",
        backend_version=f"evalscope {version('evalscope')}",
        metric=label(benchmark),
        score=score,
        n=len(samples),
        errored=errored,
        missing=0,
        unparsed=unparsed / max(len(answered), 1),
        truncated=truncated / max(len(answered), 1),
        subsets=subsets,
        protocol=protocol(benchmark, options),
        data_hash=data_hash(samples),
        seconds=round(seconds, 1),
        notes=notes(benchmark, options, samples),
    )


def label(benchmark: Benchmark) -> str:
    """The metric's name: of one's own data the one that was chosen."""
    own = benchmark.native == OWN_DATA and benchmark.native_metric
    return benchmark.native_metric if own else benchmark.metric


def notes(benchmark: Benchmark, options: Options, samples: list[SampleResult]) -> list[str]:
    """What a reader of the score should know."""
    found = [benchmark.differs] if benchmark.differs else []
    if benchmark.size and len(samples) != benchmark.size and options.limit is None:
        found.append(f"n {len(samples):,} of {benchmark.size:,}: not the benchmark as it is known")
    scored = sum(sample.score is not None for sample in samples)
    if 0 < scored < len(samples) and not any(sample.error for sample in samples):
        found.append(f"{scored:,} of {len(samples):,} samples have this metric")
    return found


def pick_metric(benchmark: Benchmark, report):
    """The metric that the benchmark names, or the library's primary one."""
    for metric in report.metrics:
        if benchmark.native_metric is None:
            wanted = metric.identity == report.primary_metric_identity
        else:
            wanted = metric.identity.name == benchmark.native_metric
        if wanted:
            return metric
    named = ", ".join(metric.identity.name for metric in report.metrics)
    raise EvalError(f"{benchmark.native} reports {named or 'no metric'}, not the one that is meant")


def protocol(benchmark: Benchmark, options: Options) -> dict:
    """What must be equal for two scores to be compared."""
    return benchmark.protocol() | {
        "backend": "native",
        "dataset": benchmark.native,
        "native_metric": benchmark.native_metric,
        "subsets": benchmark.subsets,
        "prompt": benchmark.prompt or "the adapter's own",
        "dataset_args": benchmark.dataset_args,
        "judge": options.judge.model if options.judge else None,
        "limit": options.limit,
    }


def quiet() -> None:
    """The progress bar stays on the terminal; what the library says, with a traceback for every
    sample that failed, is in `backend/logs/`."""
    from evalscope.utils.logger import get_logger

    logging.getLogger().setLevel(logging.WARNING)  # its import sets INFO, for everybody
    for handler in get_logger().handlers:
        if not isinstance(handler, logging.FileHandler):
            handler.addFilter(_nothing)


def _nothing(_record: logging.LogRecord) -> bool:
    return False
