"""The miniature's data, figures and report, small."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from examples.digits.boards import load_scans
from examples.digits.make_data import make_data
from examples.digits.report import table, variants_table, write_report
from examples.digits.score import chance, exact_match, read_rows, top1_agreement
from tests.tiny import write_llm_donor, write_vision_donor
from vlm.graft.options import BuildOptions
from vlm.graft.stream import build

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    out = tmp_path_factory.mktemp("digits") / "data"
    make_data(out, stage1=30, stage2=40, held_out=25)
    return out


def answer_of(question: str, digits: list[int]) -> str:
    """Computed again from the words of the question."""
    if "largest" in question:
        return str(max(digits))
    if "smallest" in question:
        return str(min(digits))
    if "above" in question or "larger than" in question:
        k = int("".join(c for c in question if c.isdigit()))
        return str(len([d for d in digits if d > k]))
    if "order" in question or "Sort" in question:
        return " ".join(str(d) for d in sorted(digits))
    return str(len(digits))


def test_answers_of_text_boards_follow_from_the_board(data):
    rows = read_rows(data / "held_out_text.jsonl")
    assert len(rows) == 25
    for row in rows:
        board, _, first = row["messages"][0]["content"].rpartition("\n")
        digits = [int(c) for c in board if c.isdigit()]
        questions = [first, *(m["content"] for m in row["messages"][2::2])]
        for question, answer in zip(questions, row["messages"][1::2], strict=True):
            assert answer["content"] == answer_of(question, digits)


def test_held_out_scans_are_in_no_training_picture(data):
    training, unseen = load_scans()
    assert len(unseen.labels) >= 400
    assert not set(training.numbers) & set(unseen.numbers)
    used = json.loads((data / "scans.json").read_text())
    assert set(used["held_out"]) <= set(unseen.numbers.tolist())
    for stage in ("stage1", "stage2"):
        assert used[stage] and set(used[stage]) <= set(training.numbers.tolist())


def test_rows_have_one_or_two_pictures_or_text_alone_and_several_turns(data):
    rows = read_rows(data / "stage2.jsonl")
    counts = {len(row.get("images", [])) for row in rows}
    assert counts == {0, 1, 2}
    assert all(len(row["messages"]) == 8 for row in rows)
    for row in rows:
        assert row["messages"][0]["content"].count("<image>") == len(row.get("images", []))
        for file in row.get("images", []):
            with Image.open(data / file) as image:
                assert image.width % 28 == 0 and image.height % 28 == 0


def test_same_call_same_bytes(data, tmp_path):
    make_data(tmp_path / "again", stage1=30, stage2=40, held_out=25)
    for name in ("stage1.jsonl", "held_out.jsonl", "images/stage2/00003.png"):
        assert (tmp_path / "again" / name).read_bytes() == (data / name).read_bytes()


def test_chance_is_the_most_frequent_answer_of_each_kind():
    def row(kind, answer):
        return {"kind": kind, "messages": [{"content": "?"}, {"content": answer}]}

    rows = [row("a", "1"), row("a", "1"), row("a", "2"), row("b", "7")]
    assert chance(rows) == 75.0
    assert exact_match(rows, ["1", "2", "2", "7 "]) == 50.0


def test_report_holds_every_figure_and_pictures(data, tmp_path):
    rows = read_rows(data / "held_out.jsonl")
    values = {
        "text_proof_max_abs_delta": 0.0,
        "text_proof_vs_transformers": 1e-7,
        "questions": len(rows),
        "exact_match": {"chance": 24.0, "graft": 16.0, "stage1": 88.25, "stage2": 97.5},
        "loss": {"graft": 2.0, "stage1": 0.3, "stage2": 0.03},
        "text_loss": {"llm": 0.006, "graft": 0.006, "stage2": 0.0071},
        "by_inverted": {s: {"False": 98.0, "True": 71.0} for s in ("graft", "stage1", "stage2")},
        "trainable_parameters": {"stage1": 328448, "stage2": 1780032},
        "benchmark": {
            "stage2": {"n": 200, "evalscope": 98.5, "local": 98.0, "answers_that_differ": 1}
        },
        "served": {"questions": 10, "served_equals_local": 10, "right": 9},
        "parity": [{"passed": True, "logprobs": 2e-6}, {"passed": False, "logprobs": 0.5}],
        "variants": {},
        "seconds": {"donors": 200.0, "stage1": 40.0},
    }
    for stage in ("stage1", "stage2"):
        (tmp_path / stage).mkdir()
        lines = [{"event": "train", "step": s, "loss": 3.0 / s} for s in range(1, 9)]
        (tmp_path / stage / "log.jsonl").write_text("\n".join(json.dumps(x) for x in lines))
    answers = {stage: ["5"] * len(rows) for stage in ("graft", "stage1", "stage2")}
    write_report(tmp_path, values, rows, answers, data)
    assert json.loads((tmp_path / "report.json").read_text()) == values
    text = (tmp_path / "report.md").read_text()
    assert table(values) in text and "| stage1 | 88.2 % | 71.0 % | 0.300 |  | 328,448 |" in text
    assert "200 questions (and by the local scorer): stage2 98.5 % (98.0 %)" in text
    assert "10 of 10 answers equal" in text and "1 of 2 comparisons agree" in text
    for name in ("boards.png", "losses.png"):
        with Image.open(tmp_path / name) as image:
            assert np.asarray(image).std() > 5


def test_agreement_with_the_donor_is_whole_for_the_exact_graft_alone(data, tmp_path):
    vision, llm = (
        write_vision_donor(tmp_path / "vl"),
        write_llm_donor(tmp_path / "llm", hidden_size=128),
    )
    rows = read_rows(data / "held_out_text.jsonl")[:4]
    found = {}
    for variant in ("exact", "literal"):
        build(vision, llm, tmp_path / variant, BuildOptions(variant=variant))
        found[variant] = top1_agreement(tmp_path / variant, llm, rows)
    assert found["exact"] == 100.0 and found["literal"] < 90.0


def test_the_variants_stand_beside_each_other():
    def figures(match, text):
        stages = ("graft", "stage1", "stage2")
        return {s: {"exact_match": match, "text_loss": text, "loss": 1.0} for s in stages}

    variants = {
        "exact": figures(88.25, 0.006) | {"top1_agreement": 100.0},
        "literal": figures(11.5, 3.5) | {"top1_agreement": 4.7},
    }
    lines = variants_table(variants).splitlines()
    assert {line.count("|") for line in lines} == {9}
    assert lines[2].startswith("| exact | 88.2 %") and lines[3].endswith("| 3.5000 | 4.7 % |")


def test_the_figures_in_the_guides_are_those_of_the_recorded_run():
    record = json.loads((ROOT / "bench/results/miniature.json").read_text(encoding="utf-8"))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for stage, name in (("graft", "graft"), ("stage1", "stage 1"), ("stage2", "stage 2")):
        whole, inverted = record["exact_match"][stage], record["by_inverted"][stage]["True"]
        row = f"| {name} | {whole:.1f} % | {inverted:.1f} % | {record['loss'][stage]:.3f} |"
        assert row in readme
        assert f"{record['benchmark'][stage]['evalscope']:.1f} %" in readme
    guide = (ROOT / "docs/graft.md").read_text(encoding="utf-8")
    exact, literal = (record["variants"][name] for name in ("exact", "literal"))
    for stage in ("stage1", "stage2"):
        told = [
            f"{variant[stage]['exact_match']:.1f} %, {variant[stage]['text_loss']:.4f}"
            for variant in (exact, literal)
        ]
        assert f"| {told[0]} | {told[1]} |" in guide
    agreement = [variant["top1_agreement"] for variant in (exact, literal)]
    assert f"| {agreement[0]:.0f} % | {agreement[1]:.1f} % |" in guide
