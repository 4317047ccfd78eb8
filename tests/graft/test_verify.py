"""The proof holds for a right graft and for no damaged one."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import vlm.rope
import vlm.text
from tests.tiny import write_llm_donor, write_vision_donor
from vlm.graft.__main__ import main
from vlm.graft.stream import build
from vlm.graft.verify import verify


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def grafted(tmp_path, request):
    llm = write_llm_donor(tmp_path / "llm", tie=request.param)
    build(write_vision_donor(tmp_path / "vl"), llm, tmp_path / "hybrid")
    return tmp_path / "hybrid", llm


def test_right_graft_is_proved(grafted, tmp_path):
    hybrid, llm = grafted
    code = main(
        ["verify", "--model", str(hybrid), "--llm", str(llm), "--json", str(tmp_path / "p.json")]
    )
    proof = json.loads((tmp_path / "p.json").read_text())
    assert code == 0 and proof["holds"]
    assert proof["max_abs_delta"] == 0.0
    assert proof["witness_max_abs_delta"] <= 1e-5
    assert proof["top1_agreement"] == 1.0


@pytest.mark.parametrize(("nested", "new_keys"), [(False, True), (True, False), (True, True)])
def test_donor_layouts_are_all_proved(tmp_path, nested, new_keys):
    llm = write_llm_donor(tmp_path / "llm", nested, new_keys)
    build(write_vision_donor(tmp_path / "vl"), llm, tmp_path / "hybrid")
    assert verify(tmp_path / "hybrid", llm).holds


def edit(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def _flip_norm(t):
    t["model.language_model.layers.1.self_attn.k_norm.weight"] *= -1


def _swap_layers(t):
    name = "model.language_model.layers.{}.mlp.up_proj.weight"
    t[name.format(0)], t[name.format(2)] = t[name.format(2)], t[name.format(0)]


def _poison(t):
    t["model.language_model.norm.weight"][3] = float("nan")


def _unused_row(t):
    t["model.language_model.embed_tokens.weight"][4090, 0] += 1.0


@pytest.mark.parametrize("damage", [_flip_norm, _swap_layers, _poison, _unused_row])
def test_damage_is_found_and_named(grafted, damage, capsys):
    hybrid, llm = grafted
    edit(hybrid, damage)
    assert main(["verify", "--model", str(hybrid), "--llm", str(llm)]) == 1
    assert "model.language_model." in capsys.readouterr().out


def test_dropped_q_norm_is_caught(grafted, monkeypatch):
    """The recipe's own script drops it, and nothing raises there."""
    hybrid, llm = grafted
    honest = vlm.text.Attention.forward

    def without_q_norm(self, x, cos, sin, attend):
        if self.rotate is vlm.rope.apply_mrope:
            self.q_norm = torch.nn.Identity()
        return honest(self, x, cos, sin, attend)

    monkeypatch.setattr(vlm.text.Attention, "forward", without_q_norm)
    proof = verify(hybrid, llm)
    assert not proof.holds and proof.max_abs_delta > 1e-3


def test_mrope_that_turns_text_wrongly_is_caught(grafted, monkeypatch):
    """Sections swapped between the tables' halves: text positions must not hide it."""
    hybrid, llm = grafted
    honest = vlm.rope.mrope_tables

    def swapped(position_ids, config):
        cos, sin = honest(position_ids, config)
        time, rest = config.mrope_section[0], cos.shape[-1] - config.mrope_section[0]
        return tuple(torch.cat(x.split([time, rest], -1)[::-1], -1) for x in (cos, sin))

    monkeypatch.setattr(vlm.text, "mrope_tables", swapped)
    proof = verify(hybrid, llm)
    assert not proof.holds and proof.max_abs_delta > 1e-3
