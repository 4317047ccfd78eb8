"""The page of `vlm.data.view`: what it shows is what the model gets, also in a real browser."""

import html
import re

import pytest
import torch

from tests.data.samples import GOLDEN, assistant, processor, row, sample, user, write_jsonl
from tests.data.videos import write_video
from vlm.data import view
from vlm.data.image import load_image, patchify, resize
from vlm.data.processor import IGNORED
from vlm.data.view import main, pictures, pieces, unpatchify
from vlm.data.watch import DataWorkerError


@pytest.fixture
def data(tmp_path):
    """Two good samples, one of them with an image and a video, and a bad one."""
    clip = tmp_path / write_video(tmp_path / "clip.mp4", 8, 60, 90, 4)
    seen = row("<image>what <b>is</b> it?<video>", "a square & more", ["odd113x99.png"])
    seen["images"] = [str(GOLDEN / "images/odd113x99.png")]
    seen["videos"] = [str(clip)]
    text = {"messages": [user("one"), assistant("two", loss_scale=0.5), user("3"), assistant("é")]}
    return write_jsonl(tmp_path / "data.jsonl", [seen, row("<image>", images=["none.png"]), text])


def write(data, *arguments):
    out = data.with_suffix(".html")
    code = main([str(data), "--model", str(GOLDEN / "model"), "--out", str(out), *arguments])
    return code, out


def test_the_picture_is_rebuilt_from_the_patches_level_by_level():
    config = processor().config.vision
    frames = torch.randint(0, 256, (2, 84, 140, 3), dtype=torch.uint8)
    patches = patchify(frames, config)
    assert torch.equal(unpatchify(patches, 6, 10, config), frames[0])


def test_an_image_of_a_sample_is_the_resized_file():
    example = processor().encode(
        sample(user("<image><image>?"), assistant("ok"), images=["images/r126x70.png"] * 2)
    )
    first, second = pictures(example, processor().config.vision)
    t, h, w = example.grid_thw[0]
    assert len(first) == t == 1
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[0], resize(load_image(GOLDEN / "images/r126x70.png"), h * 14, w * 14))


def test_tokens_are_all_shown_and_the_learnt_ones_are_those_of_the_targets():
    turns = (user("<image>naïve 🦊?"), assistant("ja", loss_scale=0.5), user("b"), assistant("🦊."))
    ours = processor()
    example = ours.encode(sample(*turns, images=["images/sq56.png"]))
    shown = pieces(example, ours)
    assert [i for piece in shown for i in piece.ids] == example.input_ids.tolist()
    learnt = {r + 1 for r, target in enumerate(example.targets.tolist()) if target != IGNORED}
    coloured = {p.first + n for p in shown if p.weight for n in range(len(p.ids))}
    assert coloured == learnt
    assert "".join(p.text for p in shown if p.weight == 0.5) == "ja"
    assert "".join(p.text for p in shown).count("🦊") == 2  # one character, several tokens
    (medium,) = [p for p in shown if len(p.ids) == 4 and len(set(p.ids)) == 1]
    assert medium.text == "<|image_pad|> × 4"
    first = int(example.position_ids[0, medium.first])
    assert medium.positions == (str(first), f"{first}–{first + 1}", f"{first}–{first + 1}")


def test_the_page_has_the_tokens_the_images_and_the_bad_sample(data):
    code, out = write(data)
    page = out.read_text()
    assert code == 0
    assert "2 good samples" in page and "1 bad" in page
    assert f"{data}:2" in page and "none.png does not exist" in html.unescape(page)
    shown = [html.unescape(t) for t in re.findall(r'class="token [^>]*>([^<]*)<', page)]
    assert "what <b>is</b> it?" in "".join(shown)
    assert page.count("data:image/png") == 1 + 2  # an image, and a video's temporal patches


def test_fewer_samples_are_shown_and_all_are_counted(data):
    _, out = write(data, "--samples", "1")
    page = out.read_text()
    assert page.count('class="sample"') == 1
    assert "2 good samples" in page


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["missing.jsonl", "--model", str(GOLDEN / "model")], "missing.jsonl does not exist"),
        (["data.jsonl", "--model", "./none"], "does not exist"),
        *(
            (["data.jsonl", "--model", str(GOLDEN / "model"), f"--{name}", "-1"], f"{name} is -1")
            for name in ("samples", "world", "token_budget", "patch_budget", "global_batch_size")
        ),
    ],
)
def test_bad_arguments_are_one_sentence(arguments, reason, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "data.jsonl", [row()])
    assert main([*arguments, "--out", "page.html"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and reason in message
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (DataWorkerError("a data worker died"), 1, "error: a data worker died"),
        (KeyboardInterrupt(), 130, "interrupted; nothing was written"),
    ],
)
def test_what_ends_the_index_is_one_line(data, error, code, said, monkeypatch, capsys):
    def ended(*_):
        raise error

    monkeypatch.setattr(view, "build_index", ended)
    done, out = write(data)
    assert done == code and capsys.readouterr().err.splitlines()[-1] == said
    assert not out.exists()


@pytest.mark.browser
def test_the_page_in_a_browser(browser, data):
    _, out = write(data)
    page = browser.new_page()
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(out.as_uri())
    sizes = page.eval_on_selector_all("img", "all => all.map(i => [i.naturalWidth, i.width])")
    assert len(sizes) == 3 and all(natural > 0 and shown > 0 for natural, shown in sizes)
    grids = page.eval_on_selector_all(
        ".seen i", "all => all.map(i => [i.offsetWidth, getComputedStyle(i).backgroundSize])"
    )
    assert all(width > 0 and "%" in size for width, size in grids)
    green = page.eval_on_selector(".learnt", "e => getComputedStyle(e).backgroundColor")
    plain = page.eval_on_selector(".token", "e => getComputedStyle(e).backgroundColor")
    assert green != plain
    assert page.locator(".token").count() > 20
    assert page.locator("#lengths rect").count() == 40
    assert page.locator("#packs rect").count() == 2
    assert len(page.screenshot(full_page=True)) > 10_000
    assert not said and all(url.startswith(("file:", "data:")) for url in asked)
    page.close()
