"""EvalScope's VLMEvalKit backend: its config is built, its output is read, the scoring is its own.

It runs as a process in an environment of its own (`make eval_vlmevalkit`), since VLMEvalKit needs
another transformers; eval/vlmevalkit_worker.py says what it does there. The library's files:

    backend/answers.jsonl   every answer as it came; what a resumed run does not ask again
    backend/run/            the library's own files, made anew by every run
    backend/worker.log      what it printed

A score is the library's. Without a judge answers are matched exactly, as the recipe has it.
"""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

from tqdm import tqdm

from eval.benchmarks import Benchmark
from eval.native_samples import without_keys
from eval.options import Options
from eval.result import EvalError, Result, SampleResult, data_hash
from eval.vlmevalkit_figures import read_figures, read_sample
from eval.vlmevalkit_journal import PROGRESS

ROOT = Path(__file__).resolve().parents[1]
PYTHON = ROOT / ".venv-vlmevalkit" / "bin" / "python"
WORKER = ("-m", "eval.vlmevalkit_worker")
OF_THE_LIBRARY = (
    *("BOYUE", "EVAL_FORMAT", "EVAL_PROXY", "FORCE_LOCAL", "FWD_API", "LMUData", "LOCAL_LLM"),
    *("LOCAL_RANK", "LOCAL_WORLD_SIZE", "MMEVAL_ROOT", "OPENAI_API_BASE", "OPENAI_API_KEY"),
    *("PRED_FORMAT", "PRINT_VANILLA", "RANK", "SKIP_ERR", "SPLIT_THINK", "WORLD_SIZE"),
)
"""Environment variables that change what VLMEvalKit does; a run is told everything by us."""


def run(benchmark: Benchmark, options: Options) -> tuple[Result, list[SampleResult]]:
    """Ask, score and read back.

    Raises:
        EvalError: the environment, data or judge cannot be used, or the library gave no figures
            though every answer came. A server that fails is no error here: its samples are in the
            result, without a score.
    """
    if not PYTHON.exists():
        raise EvalError(
            "VLMEvalKit's environment is not there; create it with make eval_vlmevalkit"
        )
    if benchmark.judge != "none" and options.judge is None:
        raise EvalError(
            f"VLMEvalKit scores {benchmark.vlmevalkit} by a judge; name one with --judge URL,MODEL"
        )
    began = time.monotonic()
    outcome = run_worker(benchmark, options)
    samples = [read_sample(row) for row in outcome["samples"]]
    errored = sum(sample.error is not None for sample in samples)
    missing = sum(row["missing"] for row in outcome["samples"])
    complete = bool(samples) and not errored and not missing
    if outcome["judge_failures"]:
        raise EvalError(
            f"the judge gave no answer to {len(outcome['judge_failures'])} requests (the first: "
            f"{outcome['judge_failures'][0]}); check it, then run this again with --resume"
        )
    if not errored and outcome["figures"] is None:
        raise EvalError(
            f"VLMEvalKit could not run {benchmark.vlmevalkit}: "
            f"{outcome['error'] or 'it gave no figures'} (its log: {log_of(options)})"
        )
    score, subsets, notes = None, {}, []
    if complete:
        score, subsets, notes = read_figures(benchmark, outcome)
    answered = [sample for sample in samples if sample.error is None]
    scored = sum(sample.score is not None for sample in samples)
    result = Result(
        benchmark=benchmark.name,
        checkpoint=options.checkpoint,
        model=options.model,
        backend="vlmevalkit",
        backend_version=outcome["version"],
        metric=benchmark.metric,
        score=score,
        # Where it scores groups of samples, as MMBench's circles, one of each carries the score.
        n=scored if complete and scored else len(samples),
        errored=errored,
        missing=missing,
        unparsed=sum(s.extracted is None for s in answered) / max(len(answered), 1),
        truncated=sum(s.truncated for s in answered) / max(len(answered), 1),
        subsets=subsets,
        protocol=protocol(benchmark, options),
        data_hash=data_hash(samples),
        seconds=round(time.monotonic() - began, 1),
        notes=[*([benchmark.differs] if benchmark.differs else []), *notes],
    )
    return result, samples


def task_settings(benchmark: Benchmark, options: Options) -> dict:
    """Arguments of EvalScope's TaskConfig, in the recipe's form."""
    model = {
        "api_base": f"{options.api_base}/chat/completions",
        "key": "EMPTY",  # it is logged; the worker has the real one in its environment
        "name": "CustomAPIModel",
        "type": options.model,
        "temperature": benchmark.temperature,
        "max_tokens": benchmark.max_tokens,
        "img_size": -1,
        "video_llm": False,
        "timeout": options.timeout,
        "retry": options.retries + 1,  # it counts tries
    }
    if benchmark.thinking is not None:
        model["chat_template_kwargs"] = {"enable_thinking": benchmark.thinking}
    return {
        "eval_backend": "VLMEvalKit",
        "eval_config": {
            "data": [benchmark.vlmevalkit],
            "mode": "all",
            "model": [model],
            "nproc": options.concurrency,
            # Its own choice of a judge where there is one: LOCAL_LLM puts ours in its place.
            "judge": None if options.judge else "exact_matching",
            "limit": options.limit,
            "reuse": True,
        },
        "work_dir": str(options.backend_folder.resolve() / "run"),
        "no_timestamp": True,
    }


def environment(options: Options) -> dict[str, str]:
    """Of the worker: ours, without what the library would take for a setting."""
    values = {name: value for name, value in os.environ.items() if name not in OF_THE_LIBRARY}
    values["PYTHONPATH"] = str(ROOT)
    values["MODEL_API_KEY"] = options.api_key
    values["PRED_FORMAT"] = "tsv"  # a spreadsheet takes an answer that begins with = for a formula
    values["SPLIT_THINK"] = "1"  # thoughts are no part of the answer that is scored
    data = options.data_root or os.environ.get("LMUData")  # noqa: SIM112 - the library's own
    if data:
        values["LMUData"] = str(Path(data).resolve())
    if options.judge:  # where there is none, the worker lets nobody be asked
        values["OPENAI_API_BASE"] = f"{options.judge.api_base}/chat/completions"
        values["OPENAI_API_KEY"] = options.judge.api_key
        values["LOCAL_LLM"] = options.judge.model
    return values


def log_of(options: Options) -> Path:
    return options.backend_folder / "worker.log"


def run_worker(benchmark: Benchmark, options: Options) -> dict:
    """What the worker found; EvalError where it ended without saying."""
    folder = options.backend_folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    # Whatever the library finds of an earlier run it takes for the truth of this one.
    shutil.rmtree(folder / "run", ignore_errors=True)
    outcome, journal, request = (
        folder / name for name in ("outcome.json", "answers.jsonl", "request.json")
    )
    outcome.unlink(missing_ok=True)
    if not options.resume:
        journal.unlink(missing_ok=True)
    given = {
        "task": task_settings(benchmark, options),
        "dataset": benchmark.vlmevalkit,
        "data_given": options.data_root is not None,
        "folder": str(folder),
        "journal": str(journal),
        "outcome": str(outcome),
    }
    request.write_text(json.dumps(given, indent=2) + "\n", encoding="utf-8")
    process = subprocess.Popen(
        [str(PYTHON), *WORKER, str(request)],
        cwd=folder,
        env=environment(options),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
    )
    try:
        last = follow(process, options)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if not outcome.exists():
        raise EvalError(
            f"VLMEvalKit's process ended with code {process.returncode} ({last or 'no word'}); its "
            f"log is {log_of(options)}; --resume asks only what has no answer yet"
        )
    return json.loads(outcome.read_text(encoding="utf-8"))


def follow(process: subprocess.Popen, options: Options) -> str:
    """Logs what the worker prints, without the keys, and shows its progress; its last line."""
    last = ""
    with (
        log_of(options).open("w", encoding="utf-8") as log,
        tqdm(desc="VLMEvalKit", unit="sample", disable=None) as bar,
    ):
        for line in process.stdout:
            if line.startswith(PROGRESS):
                bar.n, bar.total = map(int, line.split()[1:])
                bar.refresh()
            elif line.strip():
                last = without_keys(line.strip(), options)
                log.write(f"{last}\n")
                log.flush()
    process.wait()
    return last[:300]


def protocol(benchmark: Benchmark, options: Options) -> dict:
    """What must be equal for two scores to be compared."""
    return {
        "backend": "vlmevalkit",
        "dataset": benchmark.vlmevalkit,
        "subsets": None,
        "prompt": "VLMEvalKit's own",
        "judge": options.judge.model if options.judge else "exact_matching",
        "limit": options.limit,
        **benchmark.protocol(),
    }
