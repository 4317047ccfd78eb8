"""The donors' identity in the report, and the fingerprint that resuming trusts."""

import hashlib
import json
import os

import pytest
import torch

from tests.tiny import write_llm_donor, write_vision_donor
from vlm.checkpoint import TensorReader
from vlm.graft.identity import Identities, Stopped, fingerprint
from vlm.graft.stream import build
from vlm.shards import Entry, plan_shards


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def donors(tmp_path):
    return write_vision_donor(tmp_path / "vl"), write_llm_donor(tmp_path / "llm")


def test_files_that_gave_a_tensor_are_hashed_and_the_others_measured(donors, tmp_path):
    report = build(*donors, tmp_path / "hybrid")
    hashed = {}
    for name, folder in zip(("vision", "llm"), donors, strict=True):
        identity = report["donors"][name]
        assert identity["path"] == str(folder)
        assert identity["config_sha256"] == sha256(folder / "config.json")
        files = {path.name: path for path in folder.glob("*.safetensors")}
        assert set(identity["files"]) == set(files)
        for file, row in identity["files"].items():
            assert row["size"] == files[file].stat().st_size
            assert row.get("sha256") in (None, sha256(files[file]))
        hashed[name] = {file for file, row in identity["files"].items() if "sha256" in row}
    index = json.loads((donors[0] / "model.safetensors.index.json").read_text())
    tower = {file for key, file in index["weight_map"].items() if key.startswith("visual.blocks")}
    assert tower <= hashed["vision"] < set(report["donors"]["vision"]["files"])
    assert hashed["llm"] == {"model.safetensors"}


def test_a_blob_of_the_hubs_cache_is_known_by_its_name(donors, tmp_path):
    vision, llm = donors
    blobs = tmp_path / "cache" / "blobs"
    blobs.mkdir(parents=True)
    name = "0123456789abcdef" * 4  # not its true hash: so it was not computed
    (llm / "model.safetensors").rename(blobs / name)
    (llm / "model.safetensors").symlink_to(blobs / name)
    report = build(vision, llm, tmp_path / "hybrid")
    assert report["donors"]["llm"]["files"]["model.safetensors"]["sha256"] == name


def test_leaving_the_context_calls_the_hashing_off(donors):
    reader = TensorReader(donors[1])
    shards = plan_shards([reader.entry(name) for name in reader.names()], 10**9)
    os.truncate(donors[1] / "model.safetensors", 50_000_000_000)  # a hole: half a minute's work
    with Identities({"llm": reader}, shards) as identities:
        pass
    with pytest.raises(Stopped):
        identities.result()


def test_the_fingerprint_knows_files_values_and_layout(donors):
    def current(dtype=None, value=0.0, limit=10**9):
        reader = TensorReader(donors[1])
        entries = [reader.entry(name, dtype) for name in reader.names()]
        entries.append(Entry.of("fresh", torch.full((3,), value, dtype=torch.bfloat16)))
        return fingerprint(plan_shards(entries, limit))

    first = current()
    assert current() == first
    seen = {first, current("BF16"), current(value=1.0), current(limit=10**5)}
    os.utime(donors[1] / "model.safetensors", ns=(0, 1))
    seen.add(current())
    assert len(seen) == 5


def test_the_fingerprint_knows_another_file_of_the_same_size_and_time(donors):
    path = donors[1] / "model.safetensors"

    def current():
        reader = TensorReader(donors[1])
        return fingerprint(plan_shards([reader.entry(name) for name in reader.names()], 10**9))

    seen = {current()}
    stat = path.stat()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    seen.add(current())
    assert path.stat().st_mtime_ns == stat.st_mtime_ns and len(seen) == 2
