"""graft_report.json and the printed account say what was done, in figures and in words."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny import write_llm_donor, write_vision_donor
from vlm.checkpoint import TensorReader
from vlm.graft.options import BuildOptions
from vlm.graft.report import print_account
from vlm.graft.stream import build

EMBEDDING = "model.language_model.embed_tokens.weight"


@pytest.fixture
def donors(tmp_path):
    return write_vision_donor(tmp_path / "vl"), write_llm_donor(tmp_path / "llm", hidden_size=128)


def test_norms_are_those_of_the_rows(donors, tmp_path):
    report = build(*donors, tmp_path / "hybrid")
    norms = TensorReader(donors[1]).get(EMBEDDING).norm(dim=1)
    rows = report["vision_rows"]
    ids = {"vision_start": 4009, "vision_end": 4010, "image_pad": 4012}
    for name, index in ids.items():
        assert rows[name] == pytest.approx(norms[index].item(), rel=1e-5)
    assert rows["rows_sampled"] == 1024
    assert rows["mean"] == pytest.approx(norms[::4].mean().item(), rel=1e-5)
    assert any("stage 1 freezes them" in note for note in report["notes"])


def test_donors_options_and_tokenizer_are_on_record(donors, tmp_path):
    options = BuildOptions(seed=7, merger_init="xavier")
    report = build(*donors, tmp_path / "hybrid", options)
    for name, folder in zip(("vision", "llm"), donors, strict=True):
        config = hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()
        assert report["donors"][name]["config_sha256"] == config
        assert report["donors"][name]["path"] == str(folder)
    assert (report["options"]["seed"], report["options"]["merger_init"]) == (7, "xavier")
    assert report["tokenizer"]["donor"] == "llm" and not report["tokenizer"]["only_vision"]
    assert "<think>" in report["tokenizer"]["only_llm"]
    assert report["losses"] == []


def test_donors_of_two_dtypes_are_kept_and_noted(donors, tmp_path):
    path = donors[1] / "model.safetensors"
    save_file({name: t.bfloat16() for name, t in load_file(path).items()}, path)
    report = build(*donors, tmp_path / "hybrid")
    hybrid = TensorReader(tmp_path / "hybrid")
    tower = "model.visual.blocks.0.norm1.weight"
    assert hybrid.dtype(tower) == "F32" and hybrid.dtype(EMBEDDING) == "BF16"
    assert hybrid.dtype("model.visual.merger.mlp.0.weight") == "BF16"
    assert any("F32 (vision) and BF16 (llm)" in note for note in report["notes"])
    report = build(*donors, tmp_path / "one", BuildOptions(dtype="bfloat16"))
    assert not any("different dtypes" in note for note in report["notes"])


def test_the_account_adds_up_and_gives_statistics_and_reasons(donors, tmp_path, capsys):
    report = build(*donors, tmp_path / "hybrid", BuildOptions(variant="literal", llm_layers=2))
    print_account(report)
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if " copied " in line or " initialised " in line]
    counts = [int(line.split()[-1].replace(",", "")) for line in lines if line[:6] == "hybrid"]
    hybrid = TensorReader(tmp_path / "hybrid")
    assert counts == [sum(hybrid.get(name).numel() for name in hybrid.names())]
    assert any("normal, mean" in row and "std 0.0" in row for row in rows)
    text = "\n".join(lines)
    assert "QK-norm, which Qwen2-style attention has no place for" in text
    assert "LOST: QK-norm of 2 layers" in text and "LOST: the last layers" in text
    assert "norms of embedding rows: vision_start" in text
    assert json.loads((tmp_path / "hybrid/graft_report.json").read_text()) == report


def test_what_lies_in_memory_is_not_the_embedding(donors, tmp_path, monkeypatch):
    """At full size the embedding is 1.2 GB; the report reads rows of it."""
    honest, read = TensorReader.get, []

    def get(self, name):
        read.append(name)
        return honest(self, name)

    monkeypatch.setattr(TensorReader, "get", get)
    build(*donors, tmp_path / "hybrid")
    assert EMBEDDING not in read
    assert torch.equal(
        TensorReader(tmp_path / "hybrid").rows(EMBEDDING, 3, 5),
        honest(TensorReader(donors[1]), EMBEDDING)[3:5],
    )
