"""The proof holds for a right graft and for no damaged one, and says what is damaged."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import vlm.layers
import vlm.rope
import vlm.text
from tests.tiny import write_llm_donor, write_vision_donor
from vlm.graft import proof_tensors, proof_text
from vlm.graft.__main__ import main
from vlm.graft.options import BuildOptions
from vlm.graft.stream import build
from vlm.graft.verify import verify

TEXT, VISUAL = "model.language_model.", "model.visual."
UP = TEXT + "layers.{}.mlp.up_proj.weight"


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks to a tensor and to the vocabulary, none of them a divisor."""
    monkeypatch.setattr(proof_text, "HEAD_ROWS", 1000)
    monkeypatch.setattr(proof_tensors, "BLOCK", 3000)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Donors and hybrids by their options, each made once."""
    root = tmp_path_factory.mktemp("made")
    write_vision_donor(root / "vl")
    done = {}

    def make(tie=True, hidden_size=48, vocab_size=4096, **options):
        llm = root / f"llm-{tie}-{hidden_size}-{vocab_size}"
        if not llm.exists():
            write_llm_donor(llm, tie=tie, hidden_size=hidden_size, vocab_size=vocab_size)
        key = (llm, *sorted(options.items()))
        if key not in done:
            done[key] = root / f"hybrid{len(done)}"
            build(root / "vl", llm, done[key], BuildOptions(**options))
        return done[key], llm, root / "vl"

    return make


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def grafted(made, tmp_path, request):
    """(hybrid to be damaged, language donor, vision donor)."""
    hybrid, llm, vision = made(tie=request.param)
    return shutil.copytree(hybrid, tmp_path / "hybrid"), llm, vision


def command(hybrid, llm, vision=None, *more):
    """Exit code of the command line."""
    vision = ["--vision", str(vision)] if vision else []
    return main(["verify", "--model", str(hybrid), "--llm", str(llm), *vision, *map(str, more)])


def test_right_graft_is_proved(grafted, tmp_path, capsys):
    assert command(*grafted, "--json", tmp_path / "p.json") == 0
    proof = json.loads((tmp_path / "p.json").read_text())
    assert proof["holds"] and not proof["differences"] and not proof["lost"]
    for figures, steps in ((proof, 5), (proof["vision"], 5)):
        assert figures["max_abs_delta"] == 0.0
        assert 0.0 < figures["witness_max_abs_delta"] <= 1e-5
        assert figures["first_divergence"] is None
        assert [stage["max_abs_delta"] for stage in figures["stages"]] == [0.0] * steps
        assert all(stage["witness_max_abs_delta"] <= 1e-5 for stage in figures["stages"])
    assert [s["name"] for s in proof["stages"]][1:4] == ["layers.0", "layers.1", "layers.2"]
    assert proof["top1_agreement"] == proof["witness_top1_agreement"] == 1.0
    assert proof["perplexity"] == proof["donor_perplexity"] > 1.0
    assert "PROVED: on text the hybrid equals the language donor, its" in capsys.readouterr().out


@pytest.mark.parametrize(("nested", "new_keys"), [(False, True), (True, False), (True, True)])
def test_donor_layouts_are_all_proved(tmp_path, nested, new_keys):
    llm = write_llm_donor(tmp_path / "llm", nested, new_keys)
    vision = write_vision_donor(tmp_path / "vl", nested, new_keys)
    build(vision, llm, tmp_path / "hybrid")
    assert verify(tmp_path / "hybrid", llm, vision).holds


def edit(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def _flip_norm(t):
    t[TEXT + "layers.1.self_attn.k_norm.weight"] *= -1


def _zero_q_norm(t):
    t[TEXT + "layers.2.self_attn.q_norm.weight"].zero_()


def _swap_tensors(t):
    t[UP.format(0)], t[UP.format(2)] = t[UP.format(2)], t[UP.format(0)]


def _poison(t):
    t[TEXT + "norm.weight"][3] = float("nan")


def _unused_row(t):
    t[TEXT + "embed_tokens.weight"][4090, 0] += 1.0


def _permute_rows(t):
    weight = t[TEXT + "embed_tokens.weight"]
    weight[[11, 3000]] = weight[[3000, 11]]


def _one_value(t):
    t[TEXT + "layers.0.input_layernorm.weight"][5] += 0.25


def _vision_bias(t):
    t[VISUAL + "blocks.2.attn.qkv.bias"][7] += 0.5


def _patches(t):
    t[VISUAL + "patch_embed.proj.weight"][0] *= 2


@pytest.mark.parametrize(
    ("damage", "line", "first"),
    [
        (_flip_norm, "layers.1.self_attn.k_norm.weight: 32 of 32 values differ", "layers.1"),
        (_zero_q_norm, "layers.2.self_attn.q_norm.weight: 32 of 32 values", "layers.2"),
        (_swap_tensors, "layers.0 holds the donor's layer 2: mlp.up_proj.weight\n", "layers.0"),
        (_poison, "norm.weight: 1 of 48 values differ, the first is 3", "norm"),
        (_unused_row, "embed_tokens.weight: 1 of 4096 rows differ, the first is 4090", None),
        (_permute_rows, "embed_tokens.weight: 2 of 4096 rows differ, the first is 11", None),
        (_one_value, "layers.0.input_layernorm.weight: 1 of 48 values", "layers.0"),
        (_vision_bias, "blocks.2.attn.qkv.bias: 1 of 192 values differ, the first is 7", None),
        (_patches, "patch_embed.proj.weight: 1 of 64 rows differ, the first is 0", None),
    ],
)
def test_damage_is_found_and_named(grafted, damage, line, first, tmp_path, capsys):
    edit(grafted[0], damage)
    assert command(*grafted, "--json", tmp_path / "p.json") == 1
    printed = capsys.readouterr().out
    assert f"{line}" in printed and "NOT PROVED" in printed
    proof = json.loads(
        (tmp_path / "p.json").read_text(), parse_constant=lambda name: pytest.fail(name)
    )
    assert not proof["holds"]
    if first:
        assert proof["first_divergence"] == first and f"apart from {first} on" in printed
        assert proof["max_abs_delta"] is None or proof["max_abs_delta"] > 0.0
    visual = {_vision_bias: "blocks.2", _patches: "patch_embed"}.get(damage)
    assert proof["vision"]["first_divergence"] == visual


def test_an_unused_row_moves_no_layer_but_the_head(grafted):
    edit(grafted[0], _permute_rows)
    proof = verify(*grafted)
    assert proof.text.stages[-1].max_abs_delta == 0.0 and not proof.holds


def test_whole_layers_swapped_are_told_in_a_line_each(grafted, capsys):
    def swap(t):
        for name in [n for n in t if n.startswith(TEXT + "layers.1.")]:
            other = name.replace("layers.1.", "layers.2.")
            t[name], t[other] = t[other], t[name]

    edit(grafted[0], swap)
    assert command(*grafted) == 1
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("DIFFERS")]
    assert len(lines) == 2 and all(line.count(".weight") == 11 for line in lines)
    assert "layers.1 holds the donor's layer 2: " in lines[0]
    assert "layers.2 holds the donor's layer 1: " in lines[1]


@pytest.mark.parametrize(
    ("part", "key", "value", "line"),
    [
        ("text_config", "rms_norm_eps", 1e-3, "rms_norm_eps is 0.001, the donor's is 1e-06"),
        (
            "text_config",
            "rope_parameters",
            {"rope_theta": 1e4, "mrope_section": [4, 6, 6]},
            "theta",
        ),
        (
            "text_config",
            "rope_parameters",
            {"rope_theta": 1e6, "mrope_section": [6, 6, 4]},
            "mrope",
        ),
        ("vision_config", "window_size", 56, "window_size is 56, the donor's is 112"),
        (None, "image_token_id", 4009, "image_token_id is 4009"),
    ],
)
def test_a_changed_setting_is_named(grafted, part, key, value, line, capsys):
    path = grafted[0] / "config.json"
    raw = json.loads(path.read_text())
    (raw[part] if part else raw)[key] = value
    path.write_text(json.dumps(raw))
    assert command(*grafted) == 1
    printed = capsys.readouterr().out
    assert "DIFFERS: config.json: " in printed and line in printed


def test_a_head_that_is_not_the_donors_tied_one(made, tmp_path, capsys):
    """A hybrid with a head of its own, written out: right while it is the embedding."""
    hybrid, llm, _ = made()
    copy = shutil.copytree(hybrid, tmp_path / "hybrid")
    raw = json.loads((copy / "config.json").read_text())
    raw["tie_word_embeddings"] = raw["text_config"]["tie_word_embeddings"] = False
    (copy / "config.json").write_text(json.dumps(raw))
    edit(copy, lambda t: t.update({"lm_head.weight": t[TEXT + "embed_tokens.weight"].clone()}))
    assert command(copy, llm) == 0
    edit(copy, lambda t: t["lm_head.weight"][9].zero_())
    assert command(copy, llm) == 1
    assert (
        "lm_head.weight: 1 of 4096 rows differ, the first is 9 (against the donor's "
        "model.language_model.embed_tokens.weight)" in capsys.readouterr().out
    )


@pytest.mark.parametrize("tie", [True, False])
def test_a_grown_vocabulary_is_proved(made, tie):
    proof = verify(*made(tie=tie, vocab_size=4010))
    assert proof.holds and proof.text.perplexity == proof.text.donor_perplexity


def test_a_graft_of_fewer_layers_is_not_the_donor(made, capsys):
    hybrid, llm, vision = made(llm_layers=2)
    assert command(hybrid, llm, vision) == 1
    printed = capsys.readouterr().out
    assert "LOST: the hybrid has 2 of the donor's 3 layers" in printed
    assert "DIFFERS" not in printed and "apart from norm on" in printed


def test_the_literal_variant_says_what_it_lost_and_what_that_costs(made, tmp_path, capsys):
    hybrid, llm, vision = made(hidden_size=128, variant="literal")
    assert command(hybrid, llm, vision, "--json", tmp_path / "p.json") == 1
    printed = capsys.readouterr().out
    assert "LOST: QK-norm of all 3 layers" in printed and "DIFFERS" not in printed
    proof = json.loads((tmp_path / "p.json").read_text())
    assert proof["max_abs_delta"] > 0.1 and proof["first_divergence"] == "layers.0"
    assert 0.0 < proof["top1_agreement"] < 0.9
    assert proof["perplexity"] != proof["donor_perplexity"]
    assert proof["vision"]["max_abs_delta"] == 0.0
    copy = shutil.copytree(hybrid, tmp_path / "hybrid")
    name = TEXT + "layers.1.self_attn.v_proj.bias"
    edit(copy, lambda t: t[name][0].fill_(0.1))
    assert [found.name for found in verify(copy, llm).differences] == [name]


def test_dropped_q_norm_is_caught(grafted, monkeypatch):
    """The recipe's own script drops it, and nothing raises there."""
    honest = vlm.text.Attention.queries_keys_values

    def without_q_norm(self, x, cos, sin):
        if self.rotate is vlm.rope.apply_mrope:
            self.q_norm = torch.nn.Identity()
        return honest(self, x, cos, sin)

    monkeypatch.setattr(vlm.text.Attention, "queries_keys_values", without_q_norm)
    proof = verify(*grafted[:2])
    assert not proof.holds and proof.text.max_abs_delta > 1e-3 and not proof.differences


def test_mrope_that_turns_text_wrongly_is_caught(grafted, monkeypatch):
    """Sections swapped between the tables' halves: text positions must not hide it."""
    honest = vlm.rope.mrope_tables

    def swapped(position_ids, config):
        cos, sin = honest(position_ids, config)
        time, rest = config.mrope_section[0], cos.shape[-1] - config.mrope_section[0]
        return tuple(torch.cat(x.split([time, rest], -1)[::-1], -1) for x in (cos, sin))

    monkeypatch.setattr(vlm.text, "mrope_tables", swapped)
    proof = verify(*grafted[:2])
    assert not proof.holds and proof.text.max_abs_delta > 1e-3 and not proof.differences


def test_a_mistake_of_both_our_towers_is_seen_by_the_witness(grafted, monkeypatch):
    def wrong(self, x):
        return self.down_proj(F.gelu(self.gate_proj(x)) * self.up_proj(x))

    monkeypatch.setattr(vlm.layers.SwiGLU, "forward", wrong)
    proof = verify(*grafted)
    for figures in (proof.text, proof.vision):
        assert figures.max_abs_delta == 0.0 and figures.witness_max_abs_delta > 1e-3
    assert not proof.holds
