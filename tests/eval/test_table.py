"""python eval/table.py: what the table says, and what it refuses."""

import csv
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest

from eval.stats import INDEPENDENT, score_interval
from eval.table import main
from tests.eval.made_up import PROTOCOL, sample, write
from tests.eval.reading import addresses, cells
from vlm.page import STYLE

ROOT = Path(__file__).parents[2]


def run(capsys, *arguments) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    return (code, *capsys.readouterr())


def test_scores_intervals_and_the_macro_mean(tmp_path, capsys):
    write(tmp_path, "stage1", "ai2d", [1] * 30 + [0] * 70)
    write(tmp_path, "stage1", "docvqa", [0.5, 0.5, 1, 0], metric="ANLS")
    write(tmp_path, "stage2", "ai2d", [1] * 60 + [0] * 40)
    write(tmp_path, "stage2", "docvqa", [1, 0.5, 1, 1], metric="ANLS")
    code, out, err = run(capsys, tmp_path)
    assert code == 0 and err == ""
    assert cells(out, "Benchmark") == ["Benchmark", "Backend", "n", "stage1", "stage2"]
    low, high = score_interval([1] * 30 + [0] * 70)
    assert cells(out, "ai2d")[:4] == [
        *("ai2d", "native", "100"),
        f"30.0 [{100 * low:.1f}, {100 * high:.1f}]",
    ]
    assert cells(out, "docvqa")[3].startswith("50.0 [")
    assert cells(out, "Macro mean") == ["Macro mean", "native", "", "40.0", "73.8"]
    assert "Macro mean (native): over ai2d, docvqa." in out
    assert "¹" not in out


def test_checkpoints_keep_the_order_in_which_they_are_named(tmp_path, capsys):
    for name in ("a", "b"):
        write(tmp_path, name, "ai2d", [1, 0])
    _, out, _ = run(capsys, tmp_path / "b", tmp_path)
    assert cells(out, "Benchmark")[3:] == ["b", "a"]


def test_every_difference_is_a_footnote_and_leaves_the_mean(tmp_path, capsys):
    for name in ("a", "b"):
        write(tmp_path, name, "same", [1, 0])
        write(tmp_path, name, "alike", [1, 1])
    deeper = PROTOCOL | {"generation": {"max_tokens": 64}, "judge": "big"}
    changes = {
        "protocol": {"protocol": deeper},
        "version": {"backend_version": "1.15.0"},
        "data": {"data_hash": "eeee"},
        "metric": {"metric": "ANLS"},
        "count": {},
    }
    for benchmark, change in changes.items():
        write(tmp_path, "a", benchmark, [1, 0])
        write(tmp_path, "b", benchmark, [1, 0, 1] if benchmark == "count" else [1, 0], **change)
    _, out, _ = run(capsys, tmp_path)
    assert "protocol (native): protocol.generation.max_tokens is 512 for a; 64 for b." in out
    assert 'protocol (native): protocol.judge is not set for a; "big" for b.' in out
    assert "version (native): backend_version is 1.14.1 for a; 1.15.0 for b." in out
    assert "data (native): data_hash is d0d0d0d0d0d0 for a; eeee for b." in out
    assert "metric (native): metric is accuracy for a; ANLS for b." in out
    assert "count (native): n is 2 for a; 3 for b." in out
    assert cells(out, "count")[2] == "2 / 3"
    for benchmark in changes:
        assert re.match(rf"\| {benchmark}[¹²³⁴⁵⁶]+", f"| {cells(out, benchmark)[0]}")
    mean = next(line for line in out.splitlines() if line.startswith("Macro mean ("))
    assert mean.startswith(
        "Macro mean (native): over alike, same; left out: count (n not the same), "
    )
    assert cells(out, "Macro mean")[3:] == ["75.0", "75.0"]


def test_a_long_prompt_that_differs_is_named_and_not_quoted(tmp_path, capsys):
    write(tmp_path, "a", "ai2d", [1, 0], protocol={"prompt": "x" * 200})
    write(tmp_path, "b", "ai2d", [1, 0], protocol={"prompt": "x" * 200 + "y"})
    _, out, _ = run(capsys, tmp_path)
    assert "ai2d (native): protocol.prompt differs between a | b (see result.json)." in out


def test_incomplete_results_have_no_score_and_stay_out_of_the_mean(tmp_path, capsys):
    for name in ("a", "b"):
        for benchmark in ("one", "two"):
            write(tmp_path, name, benchmark, [1, 0])
    write(tmp_path, "a", "part", [1, 1, 1])
    # A score beside failed samples is what other tools give: it is not shown.
    write(tmp_path, "b", "part", [1, 1, None], score=100.0, missing=2, unparsed=0.125)
    write(tmp_path, "a", "alone", [1, 0], truncated=0.5, notes=["Judged by rules."])
    _, out, _ = run(capsys, tmp_path)
    assert cells(out, "part")[4].rstrip("¹²³⁴⁵⁶ ") == "no score"
    assert cells(out, "alone")[4] == "not run"
    assert "part (native), b: no score, 1 of 3 samples errored, 2 missing; run it again" in out
    assert "part (native), b: 12.5 % of the answers could not be read." in out
    assert "alone (native), a: 50.0 % of the answers ended at max_tokens." in out
    assert "alone (native): Judged by rules." in out
    assert "over one, two; left out: alone (no score of b), part (no score of b)." in out


def test_two_backends_share_neither_row_nor_mean(tmp_path, capsys):
    for benchmark in ("ai2d", "mmmu"):
        write(tmp_path, "a", benchmark, [1, 1])
        write(tmp_path, "a", benchmark, [0, 0], folder=f"kit/{benchmark}", backend="vlmevalkit")
    _, out, _ = run(capsys, tmp_path)
    rows = [line.split("|")[1:5] for line in out.splitlines() if line.startswith("| mmmu")]
    assert [row[1].strip() for row in rows] == ["native", "vlmevalkit"]
    assert [row[3].strip()[:5] for row in rows] == ["100.0", "0.0 ["]
    means = [line.split() for line in out.splitlines() if line.startswith("| Macro")]
    assert [(row[4], row[-2]) for row in means] == [("native", "100.0"), ("vlmevalkit", "0.0")]
    assert "mmmu was scored by native and vlmevalkit; scores of two backends" in out


def test_no_mean_of_a_single_benchmark(tmp_path, capsys):
    write(tmp_path, "a", "ai2d", [1, 0])
    write(tmp_path, "a", "mmmu", [1, None])
    _, out, _ = run(capsys, tmp_path)
    assert "Macro mean (native): not taken; left out: mmmu (no score of a)." in out
    assert "| Macro mean" not in out


def test_no_interval_where_the_score_is_not_the_mean_of_its_samples(tmp_path, capsys):
    write(tmp_path, "a", "grouped", [1, 0, 1, 1], score=50.0)
    unscored = [sample(k, None, error=None) for k in range(4)]
    write(tmp_path, "a", "groups", samples=unscored, errored=0, score=50.0)
    _, out, _ = run(capsys, tmp_path)
    assert cells(out, "grouped")[3] == "50.0¹" and cells(out, "groups")[3] == "50.0²"
    assert "no interval, the score 50.00 is not the mean of its samples' scores, 75.00." in out
    assert "groups (native), a: no interval, no sample carries a score of its own." in out


def test_trials_and_parts_of_a_benchmark_are_marked_and_leave_the_mean(tmp_path, capsys):
    for benchmark, fields in {
        "one": {"size": 2},
        "two": {"size": None},
        "trial": {"size": 2000, "protocol": PROTOCOL | {"limit": 2}},
        # The run said so itself: told once.
        "part": {"size": 2500, "notes": ["n 2 of 2,500: not the benchmark as it is known"]},
        "more": {"size": 1},
    }.items():
        write(tmp_path, "a", benchmark, [1, 0], **fields)
    _, out, _ = run(capsys, tmp_path)
    assert "over one, two; left out: more (not the whole benchmark), " in out
    assert "part (not the whole benchmark), trial (a trial)." in out
    ends = {name: cells(out, name)[3][-1] for name in ("more", "part", "trial", "one", "two")}
    assert ends == {"more": "¹", "part": "²", "trial": "³", "one": "]", "two": "]"}
    assert "¹ more (native): n 2 of 1: not the benchmark as it is known." in out
    assert "² part (native): n 2 of 2,500: not the benchmark as it is known." in out
    assert "³ trial (native): asked with --limit 2, a trial and not the benchmark's score." in out
    assert "⁴" not in out


def test_a_metric_that_some_samples_have_is_of_these(tmp_path, capsys):
    rows = [sample(k, score, error=None) for k, score in enumerate([1, None, 0, None, 1])]
    write(tmp_path, "a", "mixed", samples=rows, errored=0, score=200 / 3)
    low, high = score_interval([1, 0, 1])
    _, out, _ = run(capsys, tmp_path)
    assert cells(out, "mixed")[3] == f"66.7 [{100 * low:.1f}, {100 * high:.1f}]¹"
    assert "¹ mixed (native): 3 of 5 samples have this metric." in out


def test_the_table_tells_when_intervals_are_too_narrow(tmp_path, capsys):
    write(tmp_path / "r", "a", "ai2d", [1, 0])
    _, out, _ = run(capsys, tmp_path / "r", "--out", tmp_path / "out")
    assert INDEPENDENT in out and INDEPENDENT in (tmp_path / "out" / "table.html").read_text()


def test_csv_has_a_line_a_score(tmp_path, capsys):
    write(tmp_path / "r", "a, b", "ai2d", [1, 0, 1, 1])
    write(tmp_path / "r", "c", "ai2d", [1, None])
    assert run(capsys, tmp_path / "r", "--out", tmp_path / "out")[0] == 0
    rows = list(csv.DictReader(io.StringIO((tmp_path / "out" / "table.csv").read_text())))
    assert [row["checkpoint"] for row in rows] == ["a, b", "c"]
    assert (rows[0]["score"], rows[0]["n"], rows[0]["complete"]) == ("75.0", "4", "True")
    assert float(rows[0]["low"]) == pytest.approx(100 * score_interval([1, 0, 1, 1])[0])
    assert (rows[1]["score"], rows[1]["low"], rows[1]["errored"]) == ("", "", "1")
    assert "1 of 2 samples errored" in rows[1]["notes"]


def test_the_page_is_whole_escaped_and_loads_nothing(tmp_path, capsys):
    evil = "<script>alert('x')</script>&\"|\n"
    write(tmp_path / "r", evil, evil, [1, 0], folder="a", metric=evil, notes=[evil])
    write(tmp_path / "r", "x" * 60, "ai2d", [0.5, None])
    code, out, _ = run(capsys, tmp_path / "r", "--out", tmp_path / "out")
    assert code == 0
    page = (tmp_path / "out" / "table.html").read_text()
    assert "<script" not in page and "&lt;script&gt;alert(&#x27;x&#x27;)" in page
    assert addresses(page) == [] and "default-src 'none'" in page
    assert page.count("<svg") == 1 and "no score" in page
    for note in re.findall(r'href="#(note\d+)"', page):
        assert f'id="{note}"' in page
    header, rule, *rows = [line for line in out.splitlines() if line.startswith("|")]
    bars = [len(re.findall(r"(?<!\\)\|", line)) for line in (header, rule, *rows)]
    assert set(bars) == {6}
    assert (tmp_path / "out" / "table.md").read_text() in out


def test_the_check_for_what_a_page_loads_sees_it():
    assert addresses('<img src="https://x/y.png"><a href=z.html>') == ["https://x/y.png", "z.html"]
    assert len(addresses("<style>@import 'a'; b { background: url(c.png) }</style>")) == 2
    for page in ("<script>1</script>", "<img src='data:image/png,' onerror=alert(1)>"):
        with pytest.raises(AssertionError):
            addresses(page)


def luminance(color: str) -> float:
    """Relative luminance of #rrggbb (WCAG 2.2)."""
    channels = [int(color[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_colours_have_contrast_in_light_and_dark():
    """4.5 for text and 3 for what is drawn, as WCAG 2.2 asks."""
    themes = [dict(re.findall(r"--(\w+): (#\w{6})", part)) for part in STYLE.split("@media")[:2]]
    assert [len(theme) for theme in themes] == [14, 14]
    for theme in themes:
        for name in theme.keys() - {"page", "card", "line", "warn"}:
            grounds = ("card", "page", "warn") if name == "ink" else ("card", "page")
            for ground in grounds:
                high, low = sorted((luminance(theme[name]), luminance(theme[ground])))[::-1]
                assert (high + 0.05) / (low + 0.05) >= 4.5, (name, ground)


def test_two_results_of_the_same_are_refused_with_both_folders(tmp_path, capsys):
    first = write(tmp_path / "old", "a", "ai2d", [1, 0])
    second = write(tmp_path / "new", "a", "ai2d", [1, 1])
    code, out, err = run(capsys, tmp_path / "old", tmp_path / "new")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert str(first) in err and str(second) in err and "ai2d (native)" in err
    # The same folder named twice is one result.
    assert run(capsys, tmp_path / "old", first)[0] == 0


def test_bad_input_is_one_sentence_and_exit_code_2(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    damaged = write(tmp_path / "damaged", "a", "ai2d", [1, 0])
    (damaged / "samples.jsonl").write_text("{")
    good = write(tmp_path / "good", "a", "ai2d", [1, 0])
    (tmp_path / "file").write_text("")
    for arguments, said in (
        ([], "RESULTS"),
        ([good, "--ou", "x"], "--ou"),
        ([tmp_path / "empty"], f"{tmp_path / 'empty'} holds no result.json"),
        ([good, tmp_path / "nowhere"], f"{tmp_path / 'nowhere'} is not a folder"),
        ([damaged], str(damaged)),
        ([good, "--out", tmp_path / "file" / "x"], f"cannot write to {tmp_path / 'file' / 'x'}"),
    ):
        code, _, err = run(capsys, *arguments)
        assert code == 2 and said in err
        assert err.startswith("error: ") and err.count("\n") == 1


def test_it_runs_as_a_script(tmp_path):
    write(tmp_path, "a", "ai2d", samples=[sample(k, k % 2) for k in range(10)])
    script = subprocess.run(
        [sys.executable, ROOT / "eval" / "table.py", tmp_path],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"},
        check=False,
    )
    assert script.returncode == 0, script.stderr
    assert cells(script.stdout, "ai2d")[3].startswith("50.0 [")
