"""What became of every sample in EvalScope's native backend.

The library's evaluator is subclassed at the places that it offers, to learn which samples there
are and why one of them got no answer: by itself it drops a failed sample from the mean, and takes
the text of an HTTP 400 for an answer.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from eval.benchmarks import Benchmark
from eval.options import Options
from eval.result import EvalError, SampleResult, data_hash

NO_ANSWER = ("model_length", "content_filter", "unknown")
"""Stop reasons under which the library hides that the server refused a request."""


@contextmanager
def recording(name: str, asked: Path) -> Iterator[type]:
    """While it lasts, the benchmark `name` is run by an evaluator that remembers samples and
    failures.

    `asked` holds the hash of the data that the run was begun with.
    """
    from evalscope.api.registry import EVALUATOR_REGISTRY
    from evalscope.constants import Tags
    from evalscope.evaluator.evaluator import DefaultEvaluator

    class Recorder(DefaultEvaluator):
        samples: dict[tuple, SampleResult] = {}  # noqa: RUF012 - filled by the one run there is
        errors: dict[tuple, str] = {}  # noqa: RUF012
        yes_no = False

        def _collect_work_items(self, dataset_dict):
            Recorder.yes_no = Tags.YES_NO in self.benchmark.tags
            for subset, dataset in dataset_dict.items():
                for sample in dataset:
                    Recorder.samples[subset, sample.id] = _unanswered(subset, sample)
            found = data_hash(Recorder.samples.values())
            if self.use_cache and asked.exists() and asked.read_text() != found:
                raise EvalError(
                    f"the data of {name}, or how it is asked, is not what this run was begun with; "
                    "choose other --results, or remove the folder"
                )
            asked.write_text(found)
            return super()._collect_work_items(dataset_dict)

        def _process_work_item(self, item, model_prediction_dir):
            sample = item.sample if item.needs_predict else item.task_state
            key = item.subset, sample.id if item.needs_predict else sample.sample_id
            try:
                return super()._process_work_item(item, model_prediction_dir)
            except Exception as error:
                Recorder.errors[key] = shorten(error)
                raise

        def _predict_sample(self, sample, model_prediction_dir):
            state = super()._predict_sample(sample, model_prediction_dir)
            output = state.output
            if output.error or not output.choices or output.choices[0].stop_reason in NO_ANSWER:
                raise RuntimeError(output.error or output.completion or "the server refused it")
            return state

    EVALUATOR_REGISTRY.register(name)(Recorder)
    try:
        yield Recorder
    finally:
        del EVALUATOR_REGISTRY[name]


def _unanswered(subset: str, sample) -> SampleResult:
    question, images, videos = _asked(sample.input)
    return SampleResult(
        id=f"{subset}/{sample.id}",
        subset=subset,
        question=question,
        gold=sample.target if isinstance(sample.target, str) else json.dumps(sample.target),
        raw="",
        extracted=None,
        score=None,
        images=images,
        videos=videos,
    )


def read_samples(options: Options, benchmark: Benchmark, recorder) -> list[SampleResult]:
    """Every sample that there is, from the library's own predictions and reviews."""
    answers = {
        (subset, row["index"]): row["model_output"]["choices"][0]
        for subset, row in _rows(options, "predictions", benchmark)
    }
    scores = {
        (subset, row["index"]): row["sample_score"]["score"]
        for subset, row in _rows(options, "reviews", benchmark)
    }
    # A figure may be one of the whole benchmark only, as F1 is.
    own = any(benchmark.native_metric in (score["value"] or {}) for score in scores.values())
    results = []
    for key, sample in recorder.samples.items():
        if key in answers:
            truncated = answers[key]["stop_reason"] == "max_tokens"
            sample = replace(sample, raw=_said(answers[key]["message"]), truncated=truncated)
        if key in scores:
            metric = benchmark.native_metric if own else scores[key].get("main_score_name")
            sample = _scored(sample, scores[key], metric, recorder.yes_no)
        else:
            reason = recorder.errors.get(key, "it was never asked")
            sample = replace(sample, error=without_keys(reason, options))
        results.append(sample)
    return results


def _said(message: dict) -> str:
    """An answer as it came: the library keeps thoughts apart from it."""
    if isinstance(message["content"], str):
        return message["content"]
    said = {"reasoning": "<think>\n{reasoning}\n</think>\n\n", "text": "{text}"}
    return "".join(said[part["type"]].format(**part) for part in message["content"])


def _scored(sample: SampleResult, score: dict, metric: str | None, yes_no: bool) -> SampleResult:
    """`metric` is one of the library's for a sample; None for the only one there is."""
    from evalscope.utils.yes_no import extract_verdict

    values = score["value"] or {}
    value = values.get(metric) if metric else next(iter(values.values()), None)
    extracted = score.get("extracted_prediction")
    if yes_no and extracted:  # it keeps the whole answer there, and reads the verdict again
        extracted = extract_verdict(extracted, allow_lowercase_exact=True)
    # Where a judge fails the library takes its rules instead: no score of the same kind.
    failed = score.get("status") not in (None, "success")
    reason = score.get("explanation") or (score.get("judge_summary") or {}).get("error")
    return replace(
        sample,
        extracted=None if extracted in (None, "") else str(extracted),
        score=None if failed or value is None else float(value),
        error=f"not scored: {reason or score['status']}" if failed else None,
    )


def _rows(options: Options, kind: str, benchmark: Benchmark):
    """(subset, object) of every line of the library's predictions or reviews."""
    for path in sorted((options.backend_folder / kind).rglob(f"{benchmark.native}_*.jsonl")):
        subset = path.stem.removeprefix(f"{benchmark.native}_")
        with path.open(encoding="utf-8") as file:
            for line in file:
                yield subset, json.loads(line)


def _asked(messages) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    """Text, images and videos of a sample's messages."""
    texts, images, videos = [], [], []
    for message in [messages] if isinstance(messages, str) else messages:
        content = message if isinstance(message, str) else message.content
        for part in [content] if isinstance(content, str) else content:
            kind = getattr(part, "type", "text")
            if kind == "image":
                images.append(part.image)
            elif kind == "video":
                videos.append(part.video)
            elif kind == "text":
                texts.append(part if isinstance(part, str) else part.text)
    return "\n".join(texts).strip(), tuple(images), tuple(videos)


def without_keys(text: str, options: Options) -> str:
    """A server may repeat a key in what it says."""
    for key in (options.api_key, options.judge.api_key if options.judge else ""):
        if key not in ("", "EMPTY"):
            text = text.replace(key, "***")
    return text


def shorten(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
