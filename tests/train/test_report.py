"""The report holds the run's figures, and copes with any run."""

import json
import math
import re
import xml.etree.ElementTree as ET

import pytest

from tests.train.runs import log_of
from train.curves import POINTS, Series, chart, percent, show
from train.report import main, render, write_report

CONFIG = "model: m\ndtype: float32\nfreeze_vit: true\ndataset:\n- a.jsonl\nlogging_steps: 5\n"
PIXEL = "data:image/png;base64,iVBORw0KGgo="


def line(step: int, event: str = "train", **figures) -> dict:
    basis = {"loss": 8 / (step + 1), "lr": {"llm/decay": 1.0}, "useful_tflops_per_second": 0.1}
    basis |= {"seconds": 1.0, "tokens": 10, "samples": 1}
    return {"event": event, "step": step} | (basis if event == "train" else {}) | figures


@pytest.fixture
def run(tmp_path):
    """A run's directory of which only the options are there."""
    (tmp_path / "config.yaml").write_text(CONFIG)
    return tmp_path


def write_log(run, *lines) -> str:
    """The page of a run with this log."""
    (run / "log.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    return render(run)


def titles(page: str) -> list[str]:
    return [title.strip() for title in re.findall(r"<figure.*?<h3>([^<]*)", page)]


def svgs(page: str) -> list[ET.Element]:
    return [ET.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]


def test_a_finished_run_has_its_page(plain_run):
    page, last = (plain_run / "report.html").read_text(), log_of(plain_run)[-1]
    assert f"<b>{show(last['loss'])}</b>" in page
    assert "Gradient norm, before clipping" in titles(page) and "MFU" not in titles(page)
    assert "<th" not in page and "held-out answers" not in page  # nothing was held out
    assert len(svgs(page)) == len(titles(page)) > 4  # all of them well-formed


def test_a_run_that_has_logged_nothing(run):
    page = render(run)
    assert "No step has been logged yet" in page and "<svg" not in page
    assert "a.jsonl" in page and "frozen:" not in page and "all parts train" not in page


def test_a_run_of_one_step(run):
    page = write_log(run, line(1))
    assert titles(page)[0] == "Loss" and "nan" not in page


def test_evaluations_answers_and_resumes(run):
    held_out = {"loss": 0.25, "token_accuracy": 0.9, "loss_true": 0.2, "loss_shuffled": 1.2, "n": 7}
    start = {"total_steps": 30, "time": "t", "command": "c", "ranks": 1, "revision": None}
    start |= {"device": "cpu", "versions": {"torch": "2"}}
    answers = [
        {"step": step, "id": "a:1", "question": "How <many>?", "truth": "2", "answer": said}
        | {"images": [PIXEL]}
        for step, said in ((0, "7"), (10, " 5"), (20, "2 "))
    ]
    (run / "answers.jsonl").write_text("".join(json.dumps(one) + "\n" for one in answers))
    page = write_log(
        run,
        line(0, "start", **start),
        line(0, "eval", **held_out | {"loss": 2.0}),
        *(line(step) for step in range(5, 15, 5)),
        line(10, "start", **start),
        *(line(step) for step in range(15, 25, 5)),
        line(20, "eval", **held_out),
    )
    assert "+1.000" in page and "resumed at step 10" in page and "Held-out loss by image" in page
    assert "held-out loss, from 2" in page and "20 of 30 steps" in page
    assert "How &lt;many&gt;?" in page and PIXEL in page
    shown = re.findall(r"<small>(After step \d+)</small>.*?(✓|✗)", page)
    assert shown == [("After step 0", "✗"), ("After step 20", "✓")]


def test_what_a_reader_must_know_is_said(run):
    (run / "ledger.jsonl").write_text("{}\n{}\n")
    page = write_log(run, line(5), line(6, "refused"), line(7, "refused"), line(8, "skipped"))
    assert "2 steps (6, 7) refused" in page and "1 step (8) without a target" in page
    assert "2 bad samples were left out" in page


def test_nothing_of_a_run_can_break_out_of_its_page(run):
    source = '<script>alert("1")</script>'
    page = write_log(
        run,
        *(line(step, loss_by_source={source: 1.0, "b": 2.0}) for step in (1, 2)),
    )
    assert "<script" not in page and "&lt;script&gt;" in page
    assert "default-src 'none'" in page


def test_a_chart_shows_its_points():
    """Linear from 0 to 10: the middle value lies in the middle."""
    svg = svgs(chart("t", [Series("", [(0, 0.0), (5, 5.0), (10, 10.0)])]))[0]
    x, y = zip(*((float(c.get("cx")), float(c.get("cy"))) for c in svg.iter("circle")), strict=True)
    assert x[1] == (x[0] + x[2]) / 2 and y[1] == (y[0] + y[2]) / 2 and x[0] < x[2] and y[0] > y[2]


def test_a_wide_range_is_logarithmic_and_leaves_zeros_out():
    figure = chart("t", [Series("", [(0, 0.0), (1, 1.0), (2, 10.0), (3, 100.0)])])
    heights = [float(c.get("cy")) for c in svgs(figure)[0].iter("circle")]
    assert "logarithmic" in figure and len(heights) == 3
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.2)


def test_many_points_become_few_with_their_range():
    """A spike among thousands of steps is still to be seen, and told."""
    points = [(step, 1.0) for step in range(5000)]
    points[2500] = (2500, 5.0)
    figure = chart("t", [Series("loss", points)])
    assert figure.count("<title>") == POINTS and "(1.000 to 5.000)" in figure


def test_what_is_not_finite_or_not_there_is_no_point():
    assert chart("t", [Series("", []), Series("", [(1, math.nan)])]) == ""
    assert svgs(chart("t", [Series("", [(1, 2.0), (2, math.inf)])]))


def test_units():
    assert (show(12345.6), show(0.012345), show(6.1e-10), show(0)) == (
        "12,346",
        "0.0123",
        "6.10e-10",
        "0",
    )
    assert percent(0.9472) == "94.7%"


def test_the_command(run, tmp_path_factory, capsys):
    assert main([str(run)]) == 0 and (run / "report.html").exists()
    assert write_report(run) == run / "report.html"
    assert main([str(tmp_path_factory.mktemp("none"))]) == 2
    assert "is no run" in capsys.readouterr().err


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_in_a_browser(browser, plain_run, scheme):
    """On a telephone: nothing is wider than the screen, loaded from elsewhere or complained of."""
    page = browser.new_page(viewport={"width": 390, "height": 800}, color_scheme=scheme)
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("request", lambda request: asked.append(request.url))
    page.goto((plain_run / "report.html").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    ink = page.evaluate("getComputedStyle(document.querySelector('svg text')).fill")
    light = int(re.findall(r"\d+", ink)[0]) > 128
    assert light == (scheme == "dark")
    page.locator("summary").click()
    assert page.locator("pre").is_visible()
    assert not said and all(url.startswith("file:") for url in asked)
    page.close()
