"""The cache of a frozen ViT's output: what its keys depend on, and files that cannot be trusted."""

import errno
import fcntl
import os
import threading
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch

from tests.data.samples import assistant, processor, row, sample, user, write_image
from tests.data.videos import write_video
from tests.tiny import hybrid
from vlm.batch import Features
from vlm.data import features as module
from vlm.data.collate import collate
from vlm.data.features import (
    ABANDONED,
    CHECKSUM,
    DIGITS,
    WAITING,
    FeatureCache,
    FeatureWriter,
    fingerprint,
    keeping,
    measure,
)
from vlm.data.formats import parse_row
from vlm.data.formats.context import RowContext
from vlm.data.image import BadImage
from vlm.data.schema import BadSample, Sample
from vlm.loss import cross_entropy_sum

GB = 10**9
SIZES = [(56, 84), (112, 140), (28, 28), (84, 56)]


@pytest.fixture(scope="module")
def model():
    return hybrid()


@pytest.fixture
def cache(model, tmp_path) -> FeatureCache:
    return FeatureCache.of(tmp_path / "cache", model.visual)


def keep(cache: FeatureCache, key: str, rows: torch.Tensor, limit: int = GB) -> None:
    writer = FeatureWriter(cache, limit)
    writer(Features(cache.none(), ((len(rows), key),)), rows)
    writer.close()


# ---- keys


def test_a_key_is_of_content_and_shape(cache, tmp_path):
    one, other = tmp_path / "one.png", tmp_path / "other.png"
    write_image(one, 56, 84)
    other.write_bytes(one.read_bytes())
    content = one.read_bytes()
    grid = (1, 4, 6), ()
    assert cache.key(one, grid) == cache.key(other, grid) == cache.key(content, grid)
    assert len({
        cache.key(one, grid),
        cache.key(one, ((1, 6, 4), ())),
        cache.key(one, ((1, 4, 6), (0, 1))),
        cache.key(content + b"x", grid),
        cache.key((content, content + b"x"), grid),
        cache.key((content + b"x", content), grid),
        cache.key((content * 2,), grid),
    }) == 7  # fmt: skip


def test_a_file_that_cannot_be_read_is_a_bad_image(cache, tmp_path):
    with pytest.raises(BadImage, match=r"gone\.png cannot be read"):
        cache.key(tmp_path / "gone.png", ())


def test_the_folder_is_of_the_trunks_weights_and_dtype():
    towers = [hybrid().visual, hybrid(seed=1).visual, hybrid().visual.to(torch.bfloat16)]
    assert len({fingerprint(tower) for tower in towers}) == 3
    changed = hybrid().visual
    with torch.no_grad():
        changed.merger.mlp[0].weight.mul_(2)
    assert fingerprint(changed) == fingerprint(towers[0])
    with torch.no_grad():
        changed.blocks[-1].mlp.down_proj.weight[0, 0] += 1
    assert fingerprint(changed) != fingerprint(towers[0])


@pytest.mark.parametrize(
    "name",
    ["attention", "batch", "rope", "layers", "vision", "compile", "data/image", "data/media"],
)
def test_the_folder_is_of_the_code_that_makes_the_rows(model, monkeypatch, name):
    before, honest = fingerprint(model.visual), Path.read_bytes
    changed = Path(module.__file__).parents[1] / f"{name}.py"
    assert changed.is_file()

    def read(path: Path) -> bytes:
        return honest(path) + b"#" * (path.resolve() == changed)

    monkeypatch.setattr(Path, "read_bytes", read)
    assert fingerprint(model.visual) != before


@pytest.mark.parametrize("package", ["torch", "flash-attn", "pillow", "opencv-python"])
def test_the_folder_is_of_the_libraries_versions(model, monkeypatch, package):
    before, honest = fingerprint(model.visual), module._version
    monkeypatch.setattr(module, "_version", lambda name: honest(name) if name != package else "9")
    assert fingerprint(model.visual) != before


def test_compiled_blocks_have_a_folder_of_their_own(model, cache):
    assert FeatureCache.of(cache.root, model.visual, is_compiled=True).tower != cache.tower


# ---- files


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_kept_is_found_bit_for_bit(model, tmp_path, dtype):
    cache = replace(FeatureCache.of(tmp_path, model.visual), dtype=dtype)
    rows = torch.randn(24, 64).to(dtype)
    assert cache.get("ab12", 24) is None
    keep(cache, "ab12", rows)
    assert torch.equal(cache.get("ab12", 24), rows)
    assert [path.name for path in cache.path("ab12").parent.iterdir()] == ["ab12"]
    assert measure(tmp_path) == rows.nbytes + CHECKSUM


def flipped(content: bytes) -> bytes:
    return content[:100] + bytes([content[100] ^ 1]) + content[101:]


@pytest.mark.parametrize(
    "damage",
    [flipped, lambda c: c[:-1], lambda c: c[:50], lambda c: b"", lambda c: c + b"x"],
    ids=["flipped", "short", "torn", "empty", "long"],
)
def test_a_damaged_file_is_absent_and_written_again(cache, damage):
    rows = torch.randn(24, 64)
    keep(cache, "ab12", rows)
    path = cache.path("ab12")
    path.write_bytes(damage(path.read_bytes()))
    assert cache.get("ab12", 24) is None
    keep(cache, "ab12", rows)
    assert torch.equal(cache.get("ab12", 24), rows)


@pytest.mark.parametrize("shared", [False, True])
def test_writers_together_stay_below_the_limit(cache, shared):
    """Eight of them with twenty files each, of which forty fit. Where they all have the same ones,
    what is paid for twice is given back."""
    rows, limit = torch.randn(24, 64), 40 * (24 * 64 * 4 + CHECKSUM) + 5
    keys = [[f"{20 * n * (not shared) + k:04x}" for k in range(20)] for n in range(8)]
    threads = [
        threading.Thread(target=lambda mine=mine: [keep(cache, key, rows, limit) for key in mine])
        for mine in keys
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    files = list(cache.root.glob("*/*/*"))
    assert len(files) <= 20 if shared else len(files) == 40
    assert all(torch.equal(cache.get(path.name, 24), rows) for path in files)
    used = sum(path.stat().st_size for path in files)
    assert int((cache.root / "used").read_text()) == measure(cache.root) == used <= limit


def test_what_another_has_reserved_is_counted_before_it_is_written(cache):
    rows = torch.randn(24, 64)
    writer = FeatureWriter(cache, GB)
    size = rows.nbytes + CHECKSUM
    reserved = writer._reserve(cache.path("ab12"), size)
    assert measure(cache.root) == size
    writer._give_back(reserved, size)
    assert measure(cache.root) == 0 and not list(cache.root.glob("*/*/*"))
    writer.close()


def test_a_write_that_fails_gives_its_room_back(cache, monkeypatch):
    keep(cache, "ab12", torch.randn(24, 64))
    before = (cache.root / "used").read_bytes()

    def fail(*_) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("vlm.data.features.os.replace", fail)
    writer = FeatureWriter(cache, GB)
    with pytest.warns(UserWarning, match="cannot be written .*No space left"):
        writer.keep(Features(cache.none(), ((24, "cd34"),)), torch.randn(24, 64))
    writer.close()
    assert (cache.root / "used").read_bytes() == before
    assert [path.name for path in cache.root.glob("*/*/*")] == ["ab12"]


def test_the_count_is_whole_at_any_moment(cache, monkeypatch):
    """A kill at a system call leaves the old count or the new one, never an empty file."""
    rows, counts, honest = torch.randn(24, 64), [], os.pwrite
    keep(cache, "ab12", rows)

    def noting(file: int, content: bytes, place: int) -> int:
        counts.append((cache.root / "used").read_bytes())
        return honest(file, content, place)

    monkeypatch.setattr("vlm.data.features.os.pwrite", noting)
    keep(cache, "cd34", rows)
    assert len(counts) == 2 and all(len(count) == DIGITS and int(count) for count in counts)
    (cache.root / "used").write_bytes(b"")  # yet if it were: it is counted anew
    keep(cache, "ef56", rows, limit=2 * (rows.nbytes + CHECKSUM))
    assert cache.get("ef56", 24) is None


def test_a_file_system_without_locks(cache, monkeypatch):
    def refuse(*_) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    rows = torch.randn(24, 64)
    keep(cache, "ab12", rows)
    assert torch.equal(cache.get("ab12", 24), rows)
    assert measure(cache.root) == rows.nbytes + CHECKSUM


def test_the_thread_waits_on_the_device_that_the_rows_are_from(cache, monkeypatch):
    """A new thread is on device 0."""
    seen, rows = [], torch.randn(4, 64)

    class Copied:
        device = torch.device("cuda", 3)

        def synchronize(self) -> None:
            seen.append((threading.current_thread().name, "waits"))

    def set_device(device: torch.device) -> None:
        seen.append((threading.current_thread().name, device))

    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    monkeypatch.setattr(module, "_to_host", lambda rows: (rows, Copied()))
    keep(cache, "ab12", rows)
    assert seen == [("features", Copied.device), ("features", "waits")]
    assert torch.equal(cache.get("ab12", 4), rows)


def test_counting_anew_forgets_what_was_removed_and_removes_what_was_abandoned(cache):
    rows = torch.randn(24, 64)
    keep(cache, "ab12", rows)
    keep(cache, "cd34", rows)
    cache.path("cd34").unlink()
    old, young = (cache.path("ab12").with_name(f"{name}.partial") for name in ("old", "young"))
    for path in (old, young):
        path.write_bytes(b"1234")
    os.utime(old, (0, old.stat().st_mtime - ABANDONED - 1))
    (cache.root / "used").write_text("nonsense")
    assert measure(cache.root) == rows.nbytes + CHECKSUM + 4
    assert young.exists() and not old.exists()


def test_a_folder_that_cannot_be_written_costs_a_warning(cache):
    cache.path("ab12").parent.write_text("a file where a folder should be")
    writer = FeatureWriter(cache, GB)
    rows = torch.randn(4, 64)
    with pytest.warns(UserWarning, match="no more features are kept, since .*cannot be written"):
        writer.keep(Features(cache.none(), ((4, "ab12"),)), rows)
    writer.keep(Features(cache.none(), ((4, "cd34"),)), rows)
    writer.close()
    assert cache.get("cd34", 4) is None


def test_a_slow_disk_never_holds_the_training_up(cache, monkeypatch):
    go_on = threading.Event()
    monkeypatch.setattr(FeatureWriter, "keep", lambda *_: go_on.wait())
    writer = FeatureWriter(cache, GB)

    def train() -> None:
        for number in range(3 * WAITING):
            writer(Features(cache.none(), ((4, f"{number}"),)), torch.zeros(4, 64))

    training = threading.Thread(target=train, daemon=True)
    training.start()
    training.join(timeout=20)
    assert not training.is_alive()
    go_on.set()
    writer.close()


# ---- samples and batches


@pytest.fixture(scope="module")
def samples(tmp_path_factory) -> list[Sample]:
    """Text, images, a video, and frames as images."""
    folder = tmp_path_factory.mktemp("media")
    names = [write_image(folder / f"{n}.png", *size, n) for n, size in enumerate(SIZES)]
    write_video(folder / "clip.mp4", 30, 50, 66, 25)
    frames = [write_image(folder / f"frame-{n}.png", 56, 84, n) for n in range(4)]
    turns = [
        row("hi"),
        row("<image> and <image>", images=names[:2]),
        row("<video> beside <image>", images=names[2:3], videos=["clip.mp4"]),
        row("<video>", videos=[frames]),
        row("<image>", images=names[3:]),
    ]
    context = RowContext(folder)
    return [parse_row(turn, f"data.jsonl:{n}", context) for n, turn in enumerate(turns)]


def step(model, batch) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
    """Loss and gradients of the merger, the only part that trains."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".merger." in name)
        parameter.grad = None
    loss = cross_entropy_sum(model(batch), model.head_weight, batch.targets)
    loss.backward()
    return loss, [p.grad for p in model.visual.merger.parameters()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_part_found_gives_the_same_loss_and_gradient(samples, tmp_path, monkeypatch, dtype):
    """Bit for bit on a CPU, whichever of the samples with media are in the cache; the trunk runs
    over the others alone, and over none where all are found."""
    model, ours = hybrid().to(dtype), processor()
    plain = collate([ours.encode(one) for one in samples], model.config)
    loss, gradients = step(model, plain)
    assert loss.item() > 0 and all(gradient.any() for gradient in gradients)
    trunk, computed = type(model.visual).trunk, []

    def counted(tower, patches, plan):
        computed.append(len(patches))
        return trunk(tower, patches, plan)

    monkeypatch.setattr(type(model.visual), "trunk", counted)
    for known in product((False, True), repeat=4):
        cache = FeatureCache.of(tmp_path / str(known), model.visual)
        with keeping(model.visual, cache, GB):
            for one, is_known in zip(samples[1:], known, strict=True):
                if is_known:
                    step(model, collate([ours.encode(one, cache)], model.config))
        examples = [ours.encode(one, cache) for one in samples]
        for example, is_known in zip(examples[1:], known, strict=True):
            assert (len(example.patches) == 0) == is_known
        computed.clear()
        batch = collate(examples, model.config)
        found, theirs = step(model, batch)
        assert computed == ([] if all(known) else [len(batch.patches)])
        assert torch.equal(found, loss)
        assert all(map(torch.equal, theirs, gradients))


def test_what_is_found_is_not_decoded(samples, cache, model, monkeypatch):
    ours = processor()
    with keeping(model.visual, cache, GB):
        step(model, collate([ours.encode(one, cache) for one in samples], model.config))
    for name in ("load_image", "load_frames", "patchify"):
        monkeypatch.setattr(f"vlm.data.media.{name}", None)
    example = ours.encode(samples[2], cache)
    assert not len(example.patches) and example.features.media[0][1] is None
    with pytest.raises(TypeError):  # without the cache it is
        ours.encode(samples[2])


def test_a_damaged_image_is_as_bad_as_without_a_cache(cache, tmp_path):
    name = write_image(tmp_path / "damaged.png", 112, 112)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:200])
    bad = sample(user("<image>"), assistant("ok"), images=[name], folder=tmp_path)
    reasons = []
    for folder in (None, cache):
        with pytest.raises(BadSample) as caught:
            processor().encode(bad, folder)
        reasons.append(str(caught.value))
    assert reasons[0] == reasons[1]


def test_nothing_is_kept_without_a_cache(model, samples):
    with keeping(model.visual, None, GB):
        assert model.visual.keep is None
    assert processor().encode(samples[1]).features is None


def test_a_batch_with_features_moves_as_a_whole(samples, cache, model):
    batch = collate([processor().encode(one, cache) for one in samples], model.config)
    assert batch.to("meta").features.rows.device.type == "meta"
    assert batch.to("meta").features.media == batch.features.media
