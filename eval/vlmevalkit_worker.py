"""Runs VLMEvalKit through EvalScope, in the environment that `make eval_vlmevalkit` creates.

    .venv-vlmevalkit/bin/python -m eval.vlmevalkit_worker REQUEST.json     # eval/vlmevalkit.py does

By itself VLMEvalKit keeps neither what the server said nor why it said nothing, prints its figures
in place of returning them, and scores what it did not get as wrong. So every exchange goes through
a journal from which a later run is answered: a run that is resumed starts with no file of the
library's, asks what the journal lacks, and scores everything anew.

Imports the library, the standard library and the journal: nothing else is there.
"""

import copy
import functools
import json
import logging
import os
import sys
import threading
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path

from eval.vlmevalkit_journal import (
    EMPTY,
    FAILED,
    PROGRESS,
    Journal,
    is_empty,
    key_of,
    without_keys,
)

TEXT_COLUMNS = ("prediction", "eval_pred", "res", "extract")
SCORE_COLUMNS = ("hit", "score")


def main(request: dict) -> dict:
    """Runs `request["task"]`, arguments of EvalScope's TaskConfig; what became of it."""
    _add_what_numpy_2_removed()
    from evalscope import TaskConfig, run_task

    _keep_answers_as_text()
    journal = Journal(Path(request["journal"]))
    journal.watch()
    watched = Watched(request, journal)
    watched.watch()
    # EvalScope writes a name for files over the model's own.
    run_task(TaskConfig(**copy.deepcopy(request["task"])))
    return {
        "version": f"vlmevalkit {version('ms-vlmeval')} (evalscope {version('evalscope')})",
        "type": getattr(watched.dataset, "TYPE", None),
        "figures": watched.figures,
        "error": watched.error,
        "judge_failures": list(journal.judge_failures.values()),
        "samples": watched.samples(Path(request["task"]["work_dir"])),
    }


def _add_what_numpy_2_removed() -> None:
    """VLMEvalKit's JSON encoder looks at these names whenever it meets a number of numpy's."""
    import numpy

    numpy.float_, numpy.complex_ = numpy.float64, numpy.complex128


def _keep_answers_as_text() -> None:
    """Answers are written to a table and read back; there "3" became 3.0 and "None" nothing."""
    import pandas

    as_text = dict.fromkeys(TEXT_COLUMNS, str)
    for name in ("read_csv", "read_excel"):
        setattr(pandas, name, functools.partial(getattr(pandas, name), converters=as_text))


class Watched:
    """What the library knows and does not tell: the data, what was asked, the figures, errors."""

    def __init__(self, request: dict, journal: Journal) -> None:
        self.request, self.journal = request, journal
        self.dataset = self.figures = self.error = None
        self.asked: dict[str, dict] = {}
        """Index -> key, question, images."""
        self.done = 0

    def watch(self) -> None:
        import vlmeval.run
        from vlmeval.config import supported_VLM
        from vlmeval.dataset.image_base import ImageBaseDataset
        from vlmeval.smp import get_logger

        get_logger("VLMEvalKit").addHandler(ErrorKeeper(self))
        partial = supported_VLM["CustomAPIModel"]
        supported_VLM["CustomAPIModel"] = functools.partial(self._model(), **partial.keywords)
        build = vlmeval.run.build_dataset
        vlmeval.run.build_dataset = lambda name, **options: self._wrap(build(name, **options))
        prepare = ImageBaseDataset.prepare_tsv

        def prepare_tsv(dataset, url, file_md5=None):
            self._check_data(dataset.dataset_name, url, file_md5)
            if file_md5 is None:
                # Pictures are kept by number; another table of that name may have left its own.
                dataset.img_root = str(Path(self.request["folder"]) / "images")
            return prepare(dataset, url, file_md5)

        ImageBaseDataset.prepare_tsv = prepare_tsv

    def _model(self) -> type:
        """The library's class, asked under the model's name but not treated by it."""
        from vlmeval.api import CustomAPIModel

        watched = self

        class Model(CustomAPIModel):
            is_asked = True

            def __init__(self, model: str, **options) -> None:
                # The library takes a name with "o1", "ernie", ... for a service with its own
                # address and parameters.
                super().__init__(model="model", **options)
                self.model, self.key = model, os.environ["MODEL_API_KEY"]

            def generate(self, message, dataset=None):
                answer = super().generate(message, dataset)
                with watched.journal.lock:
                    watched.done += 1
                    total = len(watched.dataset.data)
                    print(f"\n{PROGRESS} {watched.done} {total}", flush=True)
                return answer

        return Model

    def _check_data(self, name: str, url: str, expected: str | None) -> None:
        """The library would write a download over a table that is not the one it knows."""
        from vlmeval.smp import LMUDataRoot, md5

        folder = Path(LMUDataRoot())
        table, old_name = folder / f"{name}.tsv", folder / url.split("/")[-1]
        if table.exists():
            found = md5(str(table))
            if expected not in (None, found):
                raise ValueError(
                    f"{table} has the md5 {found}, and VLMEvalKit knows {name} by {expected}; "
                    f"get it from {url}, or move it away to have it downloaded"
                )
        elif self.request["data_given"] and not old_name.exists():
            raise ValueError(f"{folder} has no {name}.tsv; get it from {url}")

    def _wrap(self, dataset):
        if dataset is None:
            raise ValueError("VLMEvalKit has no data of that name")
        self.dataset = dataset
        build_prompt, evaluate = dataset.build_prompt, dataset.evaluate

        def record_prompt(line, *rest, **options):
            message = build_prompt(line, *rest, **options)
            row = dataset.data.iloc[line] if isinstance(line, int) else line
            self.asked[str(row["index"])] = self._described(message)
            return message

        def record_figures(*arguments, **options):
            figures = evaluate(*arguments, **options)
            self.figures = figures
            if hasattr(figures, "to_dict"):
                self.figures = figures.reset_index(drop=True).to_dict("records")
            return figures

        dataset.build_prompt, dataset.evaluate = record_prompt, record_figures
        return dataset

    def _described(self, message: list[dict]) -> dict:
        asked = self.request["task"]["eval_config"]["model"][0]
        extra = {name: asked[name] for name in ("chat_template_kwargs",) if name in asked}
        return {
            "key": key_of(message, asked["type"], asked["temperature"], asked["max_tokens"], extra),
            "question": "\n".join(p["value"] for p in message if p["type"] == "text").strip(),
            "images": [p["value"] for p in message if p["type"] in ("image", "video")],
        }

    def samples(self, work_dir: Path) -> list[dict]:
        """One per row of the data: what was asked, what came, what the library made of it."""
        if self.dataset is None:
            return []
        details = self._details(work_dir)
        rows = self.dataset.data.drop(columns="image", errors="ignore").to_dict("records")
        return [self._sample(row, details.get(str(row["index"]), {})) for row in rows]

    def _details(self, work_dir: Path) -> dict[str, dict]:
        """Index -> columns of all tables that the library wrote about it, the answers first."""
        import pandas

        details: dict[str, dict] = defaultdict(dict)
        tables = sorted(
            work_dir.glob(f"*/*_{self.request['dataset']}*.tsv"), key=lambda p: len(p.name)
        )
        for path in tables:
            table = pandas.read_csv(path, sep="\t")
            for row in table.to_dict("records") if "index" in table else []:
                details[str(row["index"])].update(row)
        return details

    def _sample(self, row: dict, detail: dict) -> dict:
        asked = self.asked.get(str(row["index"]), {"key": "", "question": "", "images": []})
        prediction = detail.get("prediction")
        answer, error = self._answer(asked["key"], prediction)
        category = next((row[c] for c in ("category", "task_type", "split") if c in row), "")
        return {
            "id": str(row["index"]),
            "split": str(row.get("split", "")),
            "subset": str(category),
            "question": asked["question"] or str(row.get("question", "")),
            "images": asked["images"],
            "gold": str(row.get("answer", "")),
            "answer": answer,
            "error": error,
            "missing": prediction is None and error is None,
            "extracted": self._extracted(detail),
            "score": self._score(detail),
        }

    def _answer(self, key: str, prediction: str | None) -> tuple[dict | None, str | None]:
        """What the server said to a prompt and became this prediction, or why it did not."""
        answers = self.journal.answers.get(key, [])
        if prediction is None:
            return None, self.journal.failures.get(key)
        if FAILED in prediction:
            return None, self.journal.failures.get(key, "no answer came")
        if prediction == EMPTY:
            answers = [a for a in answers if is_empty(a["content"])] or answers
        same = [a for a in answers if (a["content"] or "").strip().endswith(prediction)]
        return (same or answers or [{"content": prediction}])[-1], None

    def _extracted(self, detail: dict) -> str | None:
        from vlmeval.dataset.utils.multiple_choice import build_choices
        from vlmeval.utils import can_infer

        if detail.get("prediction") == EMPTY:
            return None
        if "hit" in detail and (choices := build_choices(detail)):
            option = can_infer(detail["prediction"], dict(choices))
            if option in choices:  # of an open question the library makes a choice of its own
                return option if detail["answer"] in choices else str(choices[option])
            return detail["answer"] if detail["hit"] else None  # read out by a judge
        for column in ("extracted", "eval_pred", "res", "extract"):
            if column in detail:
                return None if detail[column] in ("Unknown", "") else detail[column]
        return detail.get("prediction")

    def _score(self, detail: dict) -> float | None:
        """0..1 by the library's own functions; None where it has none for a single sample."""
        from vlmeval.dataset.utils.mathvista import post_check
        from vlmeval.dataset.utils.vqa_eval import hit_calculate

        for column in SCORE_COLUMNS:
            if column in detail and detail[column] == detail[column]:
                return float(detail[column])
        if "eval_match" in detail:
            match = [float(value) for value in json.loads(_as_json(detail["eval_match"]))]
            return float(hit_calculate([{"match": match}], self.request["dataset"])[0])
        if "res" in detail and "answer_type" in detail:
            return float(bool(post_check(detail, prefetch=False)))
        return None


def _as_json(listed: str) -> str:
    return listed.replace("True", "1").replace("False", "0")


class ErrorKeeper(logging.Handler):
    """The library logs what went wrong with a benchmark, and goes on to the next."""

    def __init__(self, watched: Watched) -> None:
        super().__init__(logging.ERROR)
        self.watched = watched

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        text = str(error) or type(error).__name__ if error else record.getMessage()
        self.watched.error = " ".join(without_keys(text).split())[:500]


def _end_with_parent() -> None:
    """The parent holds the other end of standard input, and lets go of it when it dies."""

    def wait() -> None:
        os.read(0, 1)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


if __name__ == "__main__":
    _end_with_parent()
    given = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    text = json.dumps(main(given), default=lambda value: value.item())
    unfinished = Path(given["outcome"] + ".partial")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(given["outcome"])
