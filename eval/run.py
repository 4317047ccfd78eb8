"""Score a checkpoint behind an OpenAI-compatible endpoint, one benchmark at a time.

    python eval/run.py mmmu --api_base http://127.0.0.1:8000/v1 --model Qwen3-VL
    python eval/run.py --suite configs/eval/suite_core.yaml --serve exports/my-vlm
    python eval/run.py custom --data_root data/held_out.jsonl --serve exports/my-vlm

Writes RESULTS/CHECKPOINT/BENCHMARK/{result.json,samples.jsonl}. A score is given only where every
sample was answered and scored. Exit code 1: some were not, the same command with --resume asks
those again. Exit code 2: a mistake in what was asked for.
"""

import argparse
import json
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

from eval import benchmarks
from eval.benchmarks import Benchmark
from eval.options import Judge, Options
from eval.preflight import check_endpoints, check_settings
from eval.result import RESULT, EvalError, Result, read_result, write_result
from eval.server import serving

API_KEY, JUDGE_API_KEY = "OPENAI_API_KEY", "JUDGE_API_KEY"
"""Variables that keys are taken from: everybody can read a command line."""
MAX_NAME = 200
RUN = "run.json"
"""What a result was begun with; a run is resumed only with the same."""
ANSWERS = ("predictions/**/*.jsonl", "answers.jsonl")
"""Where the backends keep what was answered."""
DECIDES = (
    *("native", "vlmevalkit", "native_metric", "scale", "subsets", "prompt"),
    *("temperature", "max_tokens", "thinking", "dataset_args"),
)
"""What a benchmark's YAML says that its score depends on."""


def run_benchmark(benchmark: Benchmark, options: Options, backend: str) -> Result:
    """Preflight, ask and score, check, write; EvalError says what went wrong.

    The result may be incomplete; then it has no score.
    """
    if benchmark.judge == "none":  # in a suite the judge is there for the others
        options = replace(options, judge=None)
    check_settings(benchmark, options, backend)
    check_endpoints(options)
    done = prepare(benchmark, options, backend)
    if done is not None:
        return done
    if backend == "native":
        from eval import native as runner
    else:
        from eval import vlmevalkit as runner
    before = read_result(options.folder)[0] if (options.folder / RESULT).exists() else None
    result, samples = runner.run(benchmark, options)
    if before and replace(result, seconds=before.seconds) == before:
        return before  # read again, and the same
    write_result(options.folder, result, samples)
    return result


def prepare(benchmark: Benchmark, options: Options, backend: str) -> Result | None:
    """The result if it is complete already, else a folder to run in."""
    settings = {
        "benchmark": benchmark.name,
        "backend": backend,
        "model": options.model,
        "data_root": str(options.data_root.resolve()) if options.data_root else None,
        "limit": options.limit,
        "weights": options.weights,
        "judge": options.judge.model if options.judge else None,
        **{key: getattr(benchmark, key) for key in DECIDES},
    }
    begun = options.folder / RUN
    answers = (path for kind in ANSWERS for path in options.backend_folder.glob(kind))
    if not (options.folder / RESULT).exists() and not any(p.stat().st_size for p in answers):
        # Nothing to go on with, and nothing to lose.
        shutil.rmtree(options.backend_folder, ignore_errors=True)
        options.folder.mkdir(parents=True, exist_ok=True)
        begun.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        return None
    if not options.resume:
        raise EvalError(f"{options.folder} exists; give --resume to go on with it, or remove it")
    before = json.loads(begun.read_text(encoding="utf-8")) if begun.exists() else {}
    for name, value in settings.items():
        if before.get(name) != value:
            raise EvalError(
                f"{options.folder} was begun with {name} {before.get(name)!r}, not {value!r}; "
                "choose other --results, or remove it"
            )
    if (options.folder / RESULT).exists():
        result, _ = read_result(options.folder)
        # What is complete is read and scored again, which asks nothing of the model and finds out
        # whether the data has changed; a judge would be asked again.
        return result if result.complete and options.judge else None
    return None


def line(result: Result) -> str:
    """One result in one line."""
    name = f"{result.benchmark} ({result.backend})"
    if not result.complete:
        lacking = result.errored + result.missing
        return f"{name}: no score, {lacking} of {result.n} samples have no answer"
    of = f" of {result.size:,}" if result.size and result.size != result.n else ""
    trial = ", a trial with --limit" if result.protocol.get("limit") else ""
    extras = f"n {result.n:,}{of}, unparsed {result.unparsed:.1%}, truncated {result.truncated:.1%}"
    extras += trial
    return f"{name}: {result.metric} {result.score:.2f} ({extras})"


def explain(result: Result, folder: Path) -> str:
    """Why a result has no score, and what to do."""
    _, samples = read_result(folder)
    reasons = [sample.error for sample in samples if sample.error]
    first = f"; the first: {reasons[0]}" if reasons else ""
    return f"{line(result)}{first}; run the same command with --resume to ask them again"


def run_all(chosen: Sequence[Benchmark], options: Options, backend: str | None) -> int:
    """One after the other, whatever becomes of one of them; the exit code."""
    code = 0
    for benchmark in chosen:
        folder = options.folder / options.checkpoint / benchmark.name
        try:
            own = replace(options, folder=folder)
            result = run_benchmark(benchmark, own, backend or benchmark.backends[0])
        except (EvalError, OSError) as error:
            print(f"error: {benchmark.name}: {error}", file=sys.stderr)
            code = max(code, 2)
            continue
        if result.complete:
            print(line(result), flush=True)
        else:
            print(f"error: {explain(result, folder)}", file=sys.stderr)
            code = max(code, 1)
    return code


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python eval/run.py", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("benchmarks", nargs="*", metavar="NAME", help="of configs/eval/, or the path of a YAML")
    add("--suite", help="a YAML that names several benchmarks")
    add("--api_base", help="the endpoint's base URL, with or without /v1")
    add("--model", help="as the endpoint calls it")
    add("--serve", type=Path, help="an export to serve by serve/launch.py, in place of --api_base")
    add("--checkpoint", help="as the results call it (default: --model, or the export's name)")
    add("--results", type=Path, default=Path("results"))
    add("--backend", choices=("native", "vlmevalkit"), help="default: the benchmark's first")
    add("--data_root", type=Path, help="folder of the benchmarks' data; for custom the JSONL file")
    add("--limit", type=int, help="samples of each subset: a trial, marked as one")
    add("--resume", action="store_true", help="ask only what has no answer yet")
    add("--judge", type=_judge, metavar="URL,MODEL", help="a model that scores answers")
    add("--concurrency", type=int, default=Options.concurrency, help="requests at a time")
    add("--timeout", type=float, default=Options.timeout, help="seconds an answer may take")
    options = parser.parse_args(arguments)
    for name, least in (("limit", 1), ("concurrency", 1), ("timeout", 0.001)):
        value = getattr(options, name)
        if value is not None and value < least:
            parser.error(f"--{name} is {value}; it must be {least} or more")
    if len(set(options.benchmarks)) < len(options.benchmarks):
        parser.error("a benchmark is named twice")
    if options.serve and options.model:
        parser.error("--model goes with --api_base; name a served export by --checkpoint")
    if bool(options.benchmarks) == bool(options.suite):
        parser.error("name benchmarks, or a --suite")
    if bool(options.serve) == bool(options.api_base):
        parser.error("give --api_base, or an export to --serve")
    if options.api_base and not options.model:
        parser.error("--api_base needs --model")
    return options


def _judge(text: str) -> Judge:
    url, comma, model = text.rpartition(",")
    if not comma or not url.startswith("http"):
        raise argparse.ArgumentTypeError(f"{text!r} is not URL,MODEL")
    return Judge(_with_v1(url), model, os.environ.get(JUDGE_API_KEY, "EMPTY"))


def _with_v1(url: str) -> str:
    url = url.rstrip("/")
    return url if url.endswith("/v1") else f"{url}/v1"


def folder_name(checkpoint: str) -> str:
    """A checkpoint's name as that of its folder of results."""
    name = checkpoint.replace("/", "_")
    if name in ("", ".", "..") or not name.isprintable() or len(name.encode()) > MAX_NAME:
        raise EvalError(f"{checkpoint[:40]!r} is no name for a folder; choose another --checkpoint")
    return name


def fingerprint(export: Path) -> str:
    """Of an export's config and weights, without reading these: names, sizes and times; of a
    model on a hub, of its name, which should pin a revision."""
    digest = sha256(b"" if export.is_dir() else str(export).encode())  # a hub id
    for path in sorted(export.glob("*.safetensors")):
        state = path.stat()
        digest.update(f"{path.name} {state.st_size} {state.st_mtime_ns}".encode())
    config = export / "config.json"
    digest.update(config.read_bytes() if config.exists() else b"")
    return digest.hexdigest()[:16]


def _end(number: int, _frame: object) -> None:
    raise SystemExit(128 + number)


def main(arguments: list[str] | None = None) -> int:
    given = parse_arguments(arguments)
    try:
        names = benchmarks.load_suite(given.suite) if given.suite else given.benchmarks
        chosen = [benchmarks.load(name) for name in names]
        if given.serve:
            checkpoint = given.checkpoint or given.serve.resolve().name
            server = serving(given.serve, checkpoint)
        else:
            checkpoint = given.checkpoint or given.model
            server = nullcontext((_with_v1(given.api_base), given.model))
        options = Options(
            api_base="",
            model="",
            checkpoint=folder_name(checkpoint),
            folder=given.results,
            api_key=os.environ.get(API_KEY, "EMPTY"),
            data_root=given.data_root,
            limit=given.limit,
            resume=given.resume,
            judge=given.judge,
            concurrency=given.concurrency,
            timeout=given.timeout,
            weights=fingerprint(given.serve) if given.serve else "",
        )
        if given.serve:  # half a minute saved where it is known already
            for benchmark in chosen:
                check_settings(benchmark, options, given.backend or benchmark.backends[0])
        with server as (api_base, model):
            options = replace(options, api_base=api_base, model=model)
            return run_all(chosen, options, given.backend)
    except EvalError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    for ending in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, _end)  # so that a server is stopped
    sys.exit(main())
