"""The report's held-out answers: what was asked about which image, and what came of it."""

import json
from collections.abc import Iterable
from pathlib import Path

from train.config import UsageError
from vlm.page import text

MOST = 10
"""Questions shown."""
FIELDS = ("step", "id", "question", "images", "truth", "answer")
"""Of a line, which `add_answers` of train/answers.py writes."""
STYLE = """
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr));
  gap: 1rem; }
article { display: grid; grid-template-columns: 7rem 1fr; gap: 1.25rem; background: var(--card);
  border: 1px solid var(--line); border-radius: 8px; padding: 1rem; min-width: 0; }
article.bare { grid-template-columns: 1fr; } article > div { min-width: 0; }
article img { display: block; max-width: 100%; max-height: 8rem; border-radius: 4px;
  margin-bottom: .5rem; }
article small { display: block; overflow-wrap: anywhere; }
.question { font-weight: 600; margin: .1rem 0 .6rem; }
.question, .answers b { white-space: pre-wrap; overflow-wrap: anywhere; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(6rem, 1fr)); gap: 1rem; }
.answers > div { border-top: 2px solid var(--line); padding-top: .3rem; }
.answers b { font-weight: 500; }
"""


def answers_section(path: Path) -> str:
    """The questions of the last evaluation, with the first one's answers beside.

    Raises UsageError where a line of the file is no answer.
    """
    lines = path.read_bytes().splitlines() if path.exists() else []
    answers = [_read(line, f"{path}:{number}") for number, line in enumerate(lines, start=1)]
    if not answers:
        return ""
    steps = sorted({answer["step"] for answer in answers})
    told = {(answer["id"], answer["step"]): answer["answer"] for answer in answers}
    shown = [a for a in answers if a["step"] == steps[-1]][:MOST]
    cards = "\n".join(_card(answer, dict.fromkeys((steps[0], steps[-1])), told) for answer in shown)
    return f'<h2>{len(shown)} held-out answers</h2>\n<div class="cards">{cards}</div>'


def _read(line: bytes, where: str) -> dict:
    try:
        answer = json.loads(line)
        return {name: answer[name] for name in FIELDS}
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"{where} is no answer of an evaluation; remove this line") from None


def _card(answer: dict, steps: Iterable[int], told: dict[tuple[str, int], str]) -> str:
    images = "".join(
        f'<img src="{text(source)}" alt="image of the question">' for source in answer["images"]
    )
    truth = answer["truth"]
    boxes = [f"<div><small>Right answer</small><b>{text(truth)}</b></div>"]
    for step in steps:
        given = told.get((answer["id"], step))
        if given is None:
            continue
        right = given.strip() == truth.strip()
        mark = f'<span class="{"good" if right else "bad"}">{"✓" if right else "✗"}</span>'
        said = text(given) or "(nothing)"
        boxes.append(f"<div><small>After step {step:,}</small>{mark} <b>{said}</b></div>")
    start = f"<article><div>{images}</div>" if images else '<article class="bare">'
    return (
        f"{start}<div><small>{text(answer['id'])}</small>"
        f'<p class="question">{text(answer["question"])}</p>'
        f'<div class="answers">{"".join(boxes)}</div></div></article>'
    )
