"""Your own data as a benchmark: rows of the training format, whose last answer is the gold one.

Registered with EvalScope as `graftvl_custom`. Every figure is computed by the library's own
functions:

- `exact_match`: the same text, but for space around it;
- `normalised_match`: the same without regard to case;
- `anls`: normalised Levenshtein similarity, 0 below a half (arXiv:1907.00490);
- `relaxed_accuracy`: numbers within 5 %, ChartQA's rule (arXiv:2203.10244);
- `choice`: the same as `exact_match`, over the choices alone.

A row is a choice where its question lists options, a line each (`A. ...`), and gold is a letter;
its answer is the letter that the library's multiple-choice benchmarks would read out of it.
"""

import base64
import mimetypes
import re
import string
from pathlib import Path

from evalscope.api.benchmark import BenchmarkMeta, VisionLanguageAdapter
from evalscope.api.dataset import DatasetDict, Sample, build_dataset_from_records
from evalscope.api.messages import (
    ChatMessageAssistant,
    ChatMessageSystem,
    ChatMessageUser,
    ContentImage,
    ContentText,
    ContentVideo,
)
from evalscope.api.metric import Score
from evalscope.api.registry import register_benchmark
from evalscope.benchmarks.chartqa.utils import relaxed_correctness
from evalscope.constants import Tags
from evalscope.metrics.nlp.metrics import ANLS, ExactMatch
from evalscope.metrics.utils.functions import exact_match
from evalscope.utils.multi_choices import extract_answer_line, parse_answers

from eval.result import EvalError
from vlm.data.formats import parse_line
from vlm.data.formats.context import RowContext
from vlm.data.formats.openai import TAGS

NAME = "graftvl_custom"
METRICS = ["exact_match", "normalised_match", "anls", "relaxed_accuracy", "choice"]
MESSAGES = {
    "system": ChatMessageSystem,
    "user": ChatMessageUser,
    "assistant": ChatMessageAssistant,
}
LETTERS = list(string.ascii_uppercase)
OPTION = re.compile(r"^\(?([A-Z])[.):]", re.MULTILINE)


@register_benchmark(
    BenchmarkMeta(
        name=NAME,
        pretty_name="Your own data",
        description="Rows of the training format; the last answer is the gold one.",
        tags=[Tags.MULTI_MODAL, Tags.CUSTOM],
        dataset_id=NAME,
        subset_list=["default"],
        metric_list=METRICS,
        primary_metric="exact_match",
        eval_split="test",
        few_shot_num=0,
    )
)
class CustomAdapter(VisionLanguageAdapter):
    """Reads, asks and scores; `dataset_args.local_path` is the JSONL file."""

    def load(self) -> tuple[DatasetDict, None]:
        """EvalError names file and line of a row that cannot be used."""
        file = Path(self.dataset_id)
        with file.open("rb") as lines:
            rows = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
        dataset = build_dataset_from_records(
            [{"name": f"{file}:{number}", "line": line} for number, line in rows],
            self.record_to_sample,
            name=self.name,
            location=self.dataset_id,
            limit=self.limit,
            repeats=self.repeats,
            shuffle=self.shuffle,
            seed=self.seed,
        )
        return DatasetDict({"default": dataset}), None

    def record_to_sample(self, record: dict) -> Sample:
        try:
            return _sample(record["line"], record["name"], Path(self.dataset_id).parent)
        except OSError as error:
            raise EvalError(f"{record['name']}: {error.filename}: {error.strerror}") from None
        except ValueError as error:  # BadSample is one and names the row itself
            raise EvalError(str(error)) from None

    def extract_answer(self, prediction: str, task_state) -> str:
        """The letter of a choice; else what follows `ANSWER:` where the model writes so, or all."""
        if "<think>" in prediction:  # cut off in the middle of a thought: there is no answer
            return ""
        if task_state.choices:
            return "".join(sorted(parse_answers(task_state, completion=prediction)))
        marked = extract_answer_line(prediction)
        return prediction.strip() if marked is None else marked

    def match_score(
        self, original_prediction: str, filtered_prediction: str, reference: str, task_state
    ) -> Score:
        values = {
            "exact_match": float(exact_match(reference, filtered_prediction)),
            "normalised_match": ExactMatch().apply([filtered_prediction], [reference])[0],
            "anls": ANLS().apply([filtered_prediction], [reference])[0],
            "relaxed_accuracy": float(relaxed_correctness(filtered_prediction, reference.strip())),
        }
        if task_state.choices:
            values["choice"] = values["exact_match"]
        return Score(
            extracted_prediction=filtered_prediction,
            prediction=original_prediction,
            value=values,
            main_score_name="exact_match",
        )


def _sample(line: bytes, name: str, folder: Path) -> Sample:
    """ValueError, or OSError for a file that cannot be read."""
    row = parse_line(line, name, RowContext(folder))
    *asked, answer = row.messages
    if answer.role != "assistant" or not asked or not answer.content.strip():
        raise ValueError(f"{name}: the row does not end with the assistant's answer")
    if row.boxes or row.tools or any(turn.role not in MESSAGES for turn in asked):
        raise ValueError(f"{name}: a row with boxes or tools cannot be asked here")
    images, videos = iter(row.images), iter(row.videos)
    letters = OPTION.findall(asked[-1].content)
    is_choice = letters == LETTERS[: len(letters)] and answer.content.strip() in letters
    messages = []
    for turn in asked:
        try:
            content = _content(turn.role, turn.content, images, videos)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        messages.append(MESSAGES[turn.role](content=content))
    return Sample(input=messages, target=answer.content, choices=letters if is_choice else None)


def _content(role: str, text: str, images, videos) -> str | list:
    """Text, images and videos of a message, in order; text alone as it is."""
    if not any(tag in text for tag in TAGS.values()):
        return text
    if role != "user":
        raise ValueError(f"an image or a video in a message of the {role} cannot be sent")
    parts = []
    for piece in re.split(f"({'|'.join(TAGS.values())})", text):
        if piece == TAGS["image"]:
            parts.append(ContentImage(image=_data_uri(next(images), "image/png")))
        elif piece == TAGS["video"]:
            video = next(videos)
            if isinstance(video, tuple):
                raise ValueError("a video given as a list of frames cannot be sent; give a file")
            uri = _data_uri(video, "video/mp4")
            parts.append(ContentVideo(video=uri, format=uri[11 : uri.index(";")]))
        elif piece:
            parts.append(ContentText(text=piece))
    return parts


def _data_uri(media: Path | bytes, default: str) -> str:
    name = media.name if isinstance(media, Path) else ""
    data = media.read_bytes() if isinstance(media, Path) else media
    kind = mimetypes.guess_type(name)[0] or default
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
