"""python eval/compare.py: pairs, figures, pages, and what it refuses."""

import base64
import html
import re
from dataclasses import replace

from eval.compare import main, page_name
from eval.matrix import Key
from eval.pairs import compare
from eval.stats import INDEPENDENT
from tests.eval.made_up import PROTOCOL, data_uri, image_bytes, sample, write
from tests.eval.reading import addresses, cells


def run(capsys, *arguments) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    return (code, *capsys.readouterr())


def test_samples_are_matched_by_id_and_not_by_place(tmp_path, capsys):
    rows = [sample(k, score) for k, score in enumerate([1, 1, 0, 0, 1, 1])]
    changed = [replace(rows[k], score=score) for k, score in enumerate([1, 0, 1, 1, 1, 1])]
    a = write(tmp_path, "a", "ai2d", samples=rows)
    b = write(tmp_path, "b", "ai2d", samples=changed[::-1])
    comparison = compare(a, b)
    assert [pair.a.id for pair in comparison.fell] == ["s1"]
    assert {pair.a.id for pair in comparison.rose} == {"s2", "s3"}
    code, out, err = run(capsys, a, b)
    assert (code, err) == (0, "") and "Warning" not in out
    row = cells(out, "ai2d")
    assert row[2:5] == ["66.7", "83.3", "+16.7"]
    assert row[6:] == ["1", "2", "1.000", "6", "0", "0"]
    # Turned round, the sign is.
    assert cells(run(capsys, b, a)[1], "ai2d")[4] == "-16.7"


def test_subsets_may_number_their_samples_alike(tmp_path):
    rows = [sample(0, 1), sample(0, 0, subset="other", gold="x")]
    comparison = compare(
        write(tmp_path, "a", "ai2d", samples=rows),
        write(tmp_path, "b", "ai2d", samples=[replace(rows[0], score=0.0), rows[1]]),
    )
    assert comparison.statistics.n == 2
    assert [pair.a.subset for pair in comparison.fell] == ["default"]


def test_graded_scores_have_no_mcnemar_and_are_sorted_by_change(tmp_path, capsys):
    a = write(tmp_path, "a", "docvqa", [0.5, 1, 0.9, 0.2], metric="ANLS")
    b = write(tmp_path, "b", "docvqa", [0.4, 0, 1, 0.9], metric="ANLS")
    comparison = compare(a, b)
    assert [pair.a.id for pair in comparison.fell] == ["s1", "s0"]
    assert [pair.a.id for pair in comparison.rose] == ["s3", "s2"]
    _, out, _ = run(capsys, a, b, "--out", tmp_path / "out")
    assert cells(out, "docvqa")[8] == "–"
    page = (tmp_path / "out" / "docvqa-native.html").read_text()
    assert "Score fell (2)" in page and "McNemar" not in page


def test_what_only_one_of_them_scored_is_counted_and_warned_of(tmp_path, capsys):
    a = write(tmp_path, "a", "ai2d", [1, 0, 1, None])
    b = write(tmp_path, "b", "ai2d", [1, 1, None, 0])
    code, out, _ = run(capsys, a, b, "--out", tmp_path / "out")
    assert code == 0
    assert cells(out, "ai2d")[9:] == ["2", "1", "1"]
    for name in ("compare.html", "ai2d-native.html"):
        assert "1 only in A, 1 only in B" in (tmp_path / "out" / name).read_text()
    assert "Warning: ai2d (native): A is incomplete, 1 of 4 samples errored, 0 missing" in out
    assert "Warning: ai2d (native): B is incomplete" in out


def test_other_settings_data_or_version_are_warned_of_everywhere(tmp_path, capsys):
    a = write(tmp_path, "a", "ai2d", [1, 0])
    b = write(
        *(tmp_path, "b", "ai2d", [1, 1]),
        **{"protocol": PROTOCOL | {"temperature": 0.6}, "data_hash": "ee", "backend_version": "2"},
    )
    _, out, _ = run(capsys, a, b, "--out", tmp_path / "out")
    said = (
        "data_hash is d0d0d0d0d0d0 for A; ee for B",
        "backend_version is 1.14.1 for A; 2 for B",
        "protocol.temperature is 0.0 for A; 0.6 for B",
    )
    pages = [(tmp_path / "out" / name).read_text() for name in ("compare.html", "ai2d-native.html")]
    for one in said:
        assert f"Warning: ai2d (native): settings or data differ, {one}." in out
        assert all(one in page for page in pages)


def test_a_score_that_is_not_the_mean_is_warned_of(tmp_path, capsys):
    a = write(tmp_path, "a", "ai2d", [1, 0, 1, 1], score=50.0)
    b = write(tmp_path, "b", "ai2d", [1, 1, 1, 1])
    assert (
        "A: the score 50.00 is not the mean of its samples' scores, 75.00" in run(capsys, a, b)[1]
    )


def test_trials_parts_and_partial_metrics_are_warned_of(tmp_path, capsys):
    rows = [sample(k, score, error=None) for k, score in enumerate([1, None, 0, None])]
    mixed = {"samples": rows, "errored": 0, "score": 50.0, "n": 4}
    a = write(tmp_path, "a", "mmmu", **mixed, size=900, protocol=PROTOCOL)
    b = write(tmp_path, "b", "mmmu", **mixed, size=900, protocol=PROTOCOL | {"limit": 4})
    assert run(capsys, a, b, "--out", tmp_path / "out")[0] == 0
    pages = [tmp_path / "out" / name for name in ("compare.md", "compare.html", "mmmu-native.html")]
    for page in map(html.unescape, (path.read_text() for path in pages)):
        assert "A: n 4 of 900: not the benchmark as it is known." in page
        assert "B: asked with --limit 4, a trial and not the benchmark's score." in page
        assert "A: 2 of 4 samples have this metric." in page
        assert "B: n 4 of 900" not in page and "not the mean" not in page
        assert INDEPENDENT in page
    assert cells(pages[0].read_text(), "mmmu")[9:] == ["2", "0", "0"]


def test_whole_checkpoints_share_what_they_share(tmp_path, capsys):
    for name in ("a", "b"):
        write(tmp_path, name, "ai2d", [1, 0])
        write(tmp_path, name, "mmmu", [1, 0, 0])
    write(tmp_path, "a", "docvqa", [1, 0])
    write(tmp_path, "b", "pope", [1, 0], backend="vlmevalkit")
    code, out, _ = run(capsys, tmp_path / "a", tmp_path / "b", "--out", tmp_path / "out")
    assert code == 0 and cells(out, "mmmu")[9] == "3"
    assert "only one of them has docvqa (native), pope (vlmevalkit)" in out
    index = (tmp_path / "out" / "compare.html").read_text()
    pages = re.findall(r'<a href="([^"]+)"', index)
    assert pages == ["ai2d-native.html", "mmmu-native.html"]
    assert all((tmp_path / "out" / page).is_file() for page in pages)
    assert addresses(index) == pages


def test_one_benchmark_that_cannot_be_compared_does_not_hide_the_others(tmp_path, capsys):
    for name in ("a", "b"):
        write(tmp_path, name, "ai2d", [1, 0])
    write(tmp_path, "a", "mmmu", [1, 0])
    write(tmp_path, "b", "mmmu", [1, 0], metric="ANLS")
    code, out, err = run(capsys, tmp_path / "a", tmp_path / "b")
    assert code == 1 and cells(out, "ai2d")[9] == "2"
    assert err.startswith("error: mmmu (native): ") and "metric is accuracy for A; ANLS" in err


def test_refusals_are_one_sentence_and_exit_code_2(tmp_path, capsys):
    ai2d = write(tmp_path, "a", "ai2d", [1, 0])
    other = [sample(0, 1), sample(1, 0, gold="something else")]
    kit = write(tmp_path / "2", "b", "ai2d", [1, 0], backend="vlmevalkit")
    none = write(tmp_path / "3", "b", "ai2d", [None, None])
    unlike = write(tmp_path / "4", "b", "ai2d", samples=other, protocol={})
    twice = write(tmp_path / "5", "b", "ai2d", samples=[sample(0, 1), sample(0, 1)])
    write(tmp_path / "6", "b", "ai2d", [1, 0])
    write(tmp_path / "6", "c", "ai2d", [1, 0])
    double = write(tmp_path / "7", "b", "ai2d", [1, 0])
    again = write(tmp_path / "7", "b", "ai2d", [1, 0], folder="b/again")
    for second, said in (
        (kit, ["share no benchmark", "ai2d (native)", "ai2d (vlmevalkit)"]),
        (none, ["no sample has a score in both"]),
        (unlike, ["sample s1 is not the same question in both", "protocol"]),
        (twice, [f"{twice} holds sample s0", "twice"]),
        (tmp_path / "6", ["holds several checkpoints (b, c)"]),
        (tmp_path / "7", [str(double), str(again), "both hold ai2d (native)"]),
        (tmp_path / "nowhere", ["is not a folder"]),
    ):
        code, out, err = run(capsys, ai2d, second)
        assert (code, out, err.count("\n")) == (2, "", 1) and err.startswith("error: ")
        assert all(part in err for part in said), err
    code, _, err = run(capsys, ai2d)
    assert code == 2 and err == "error: the following arguments are required: B\n"


def test_the_page_shows_what_flipped_escaped_and_loads_nothing(tmp_path, capsys):
    evil = "<img src=x onerror=alert(1)>\x00&'\""
    fields = {"question": f"Which? {evil}", "gold": f"B{evil}"}
    file = tmp_path / "board.png"
    file.write_bytes(image_bytes())
    gone = tmp_path / f"{'<b>'}gone.png"
    rows = [
        sample(0, 1, images=(data_uri(image_bytes()), str(file)), **fields),
        sample(1, 0, images=(str(gone),)),
        sample(2, 1, raw="unchanged, never shown"),
    ]
    changed = [
        replace(rows[0], score=0, raw=f"<think>{evil}</think>", extracted=None, truncated=True),
        replace(rows[1], score=1.0, raw="long answer", extracted="B."),
        rows[2],
    ]
    write(tmp_path, f"a{evil}", "ai2d", samples=rows, folder="a")
    write(tmp_path, f"b{evil}", "ai2d", samples=changed, folder="b")
    assert run(capsys, tmp_path / "a", tmp_path / "b", "--out", tmp_path / "out")[0] == 0
    for name in ("compare.html", "ai2d-native.html"):
        page = (tmp_path / "out" / name).read_text()
        assert "<img src=x" not in page and "<think>" not in page and "\x00" not in page
        assert "default-src 'none'" in page
    assert addresses(page) == []
    fell, rose = page.split("Right → wrong (1)")[1].split("Wrong → right (1)")
    assert "Which? &lt;img" in fell and "B&lt;img" in fell and "given 0" in fell
    assert "&lt;think&gt;" in fell and "ANSWER: given 0" in fell
    assert "nothing could be read" in fell and "cut off at max_tokens" in fell
    assert fell.count("<img ") == 2
    assert "long answer" in rose and "gone.png is gone" in rose and "<b>gone" not in rose
    assert "never shown" not in page


def test_a_name_cannot_lead_out_of_the_folder(tmp_path, capsys):
    for name in ("a", "b"):
        write(tmp_path, name, "../../x", [1, 0], folder=name)
    assert run(capsys, tmp_path / "a", tmp_path / "b", "--out", tmp_path / "out")[0] == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    names -= {"compare.md", "compare.html"}
    assert [name[:14] for name in names] == ["______x-native"]


def test_benchmarks_whose_names_look_alike_have_pages_of_their_own(tmp_path, capsys):
    names = ["数字", "图表", "a.b", "a_b", "a/b", "A_b", "x" * 300, "x" * 301]
    for k, name in enumerate(names):
        for checkpoint, score in (("a", 1), ("b", 0)):
            rows = [sample(0, score, question=f"Asked by {k}?")]
            write(tmp_path, checkpoint, name, samples=rows, folder=f"{checkpoint}/{k}")
    run(capsys, tmp_path / "a", tmp_path / "b", "--out", tmp_path / "out")
    links = re.findall(
        '<a href="([^"]+)">([^<]+)</a>', (tmp_path / "out" / "compare.html").read_text()
    )
    assert sorted(name for _, name in links) == sorted(names)
    assert len({file.lower() for file, _ in links}) == len(names)
    for file, name in links:
        page = (tmp_path / "out" / file).read_text()
        assert re.findall(r"Asked by \d", page) == [f"Asked by {names.index(name)}"]
        # The same whatever else a report holds.
        assert file == page_name(Key(name, "native"))
    assert dict(map(reversed, links))["a_b"] == "a_b-native.html"


def test_videos_are_named_and_not_held(tmp_path, capsys):
    clip = tmp_path / "<b>clip.mp4"
    clip.write_bytes(b"never held")
    row = sample(0, 1, videos=(str(clip), data_uri(b"never held", "video/mp4")))
    a = write(tmp_path, "a", "mvbench", samples=[row])
    b = write(tmp_path, "b", "mvbench", samples=[replace(row, score=0.0)])
    run(capsys, a, b, "--out", tmp_path / "out")
    page = (tmp_path / "out" / "mvbench-native.html").read_text()
    assert "video: &lt;b&gt;clip.mp4" in page and "video: without a name" in page
    assert "<video" not in page and "data:video" not in page and addresses(page) == []
    assert base64.b64encode(b"never held").decode() not in page


def test_a_page_of_very_many_says_how_many_are_left_out(tmp_path, capsys):
    write(tmp_path, "a", "ai2d", [1] * 203)
    write(tmp_path, "b", "ai2d", [0] * 203)
    run(capsys, tmp_path / "a", tmp_path / "b", "--out", tmp_path / "out")
    page = (tmp_path / "out" / "ai2d-native.html").read_text()
    assert "Right → wrong (203)" in page and "3 more are not shown" in page
    assert page.count("<article") == 200
