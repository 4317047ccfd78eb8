"""Layer by layer is the whole model's forward pass, in one layer's memory."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen3ForCausalLM

from tests.tiny import randomise, write_llm_donor, write_vision_donor
from vlm.checkpoint import TensorReader, load_model, save_model
from vlm.graft import proof_text
from vlm.graft.proof_tensors import DonorTensors
from vlm.graft.proof_text import LAYER, NORM, Stream, Tally, compare_texts, part, text_batch
from vlm.graft.proof_vision import BLOCK, EMBEDDING, TowerStream, synthetic_images
from vlm.graft.proof_witness import TextWitness, witness_trunk
from vlm.graft.stream import build
from vlm.hf_config import parse_text_config, read_config, read_json
from vlm.model import LanguageModel
from vlm.vision import normalise, plan_vision


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(hybrid, language donor, vision donor)."""
    root = tmp_path_factory.mktemp("made")
    llm, vision = write_llm_donor(root / "llm", tie=False), write_vision_donor(root / "vl")
    build(vision, llm, root / "hybrid")
    return root / "hybrid", llm, vision


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def texts():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 4000, (length,), generator=generator) for length in (9, 1, 30)]


def test_the_hybrids_stream_is_its_forward_pass(made, texts):
    model, reader = load_model(made[0]), TensorReader(made[0])
    batch = text_batch(texts, model.config)
    stream = Stream(reader, model.config.text, batch, batch.position_ids)
    for index in range(3):
        stream.advance(part(reader, LAYER.format(index)))
    stream.finish(reader.get(NORM))
    assert torch.equal(stream.x, model(batch))


def test_the_towers_stream_is_the_trunk(made):
    model, reader = load_model(made[0]), TensorReader(made[0])
    patches, grids = synthetic_images(model.config.vision)
    assert any(t > 1 for t, _, _ in grids) and any(h > 8 for _, h, _ in grids)
    stream = TowerStream(model.config.vision, reader, patches, grids)
    for index in range(4):
        stream.advance(index)
    assert torch.equal(
        stream.x, model.visual.trunk(patches, plan_vision(grids, read_config(made[0]).vision))
    )


def test_the_text_witness_is_transformers_whole_model(made, texts):
    llm = made[1]
    whole = Qwen3ForCausalLM.from_pretrained(llm, dtype=torch.float32, attn_implementation="eager")
    reader = TensorReader(llm)
    embedded = whole.model.embed_tokens(torch.cat(texts))
    witness = TextWitness(read_json(llm / "config.json"), embedded, tuple(map(len, texts)))
    for index in range(3):
        witness.advance(part(reader, LAYER.format(index)))
    witness.finish(reader.get(NORM))
    expected = torch.cat([whole.model(input_ids=t[None]).last_hidden_state[0] for t in texts])
    torch.testing.assert_close(witness.x, expected, rtol=0, atol=1e-6)


def test_the_vision_witness_is_transformers_whole_tower(made):
    vision = made[2]
    whole = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        vision, dtype=torch.float32, attn_implementation="eager"
    ).model.visual
    reader, raw = TensorReader(vision), read_json(vision / "config.json")["vision_config"]
    patches, grids = synthetic_images(read_config(vision).vision)
    states = witness_trunk(
        raw,
        normalise(patches),
        grids,
        reader.get(EMBEDDING),
        lambda i: part(reader, BLOCK.format(i)),
    )
    assert len(states) == 5
    expected = whole(normalise(patches), torch.tensor(grids)).last_hidden_state
    torch.testing.assert_close(states[-1], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rows", [1000, 8192])
def test_figures_are_those_of_all_logits_at_once(made, texts, rows, monkeypatch):
    """With a hybrid that is not its donor, so that no figure is trivial."""
    monkeypatch.setattr(proof_text, "HEAD_ROWS", rows)
    hybrid, llm, _ = made
    raw = read_json(llm / "config.json") | {"rms_norm_eps": 0.3}
    donor = DonorTensors(TensorReader(llm), TensorReader(hybrid))
    config, theirs = read_config(hybrid), parse_text_config(raw)
    found = compare_texts(texts, config, TensorReader(hybrid), theirs, donor, raw)

    model = load_model(hybrid)
    batch = text_batch(texts, config)
    ours = F.linear(model(batch), model.head_weight)
    with torch.device("meta"):
        other = LanguageModel(theirs)
    reader = TensorReader(llm)
    other.load_state_dict({name: reader.get(name) for name in reader.names()}, assign=True)
    expected = F.linear(
        other(batch.input_ids, batch.segments, batch.target_rows), other.head_weight
    )
    delta = (ours - expected).abs().max().item()
    assert found.max_abs_delta == pytest.approx(delta, rel=1e-4) and delta > 0.01
    assert found.witness_max_abs_delta == pytest.approx(
        delta / expected.abs().max().item(), rel=1e-4
    )
    agreement = (ours.argmax(-1) == expected.argmax(-1)).float().mean().item()
    assert found.top1_agreement == found.witness_top1_agreement == pytest.approx(agreement)
    assert agreement < 1.0
    next_tokens = torch.cat([torch.cat([text[1:], torch.tensor([-100])]) for text in texts])
    for value, logits in ((found.perplexity, ours), (found.donor_perplexity, expected)):
        loss = F.cross_entropy(logits.double(), next_tokens)
        assert value == pytest.approx(loss.exp().item(), rel=1e-5)


def test_the_most_likely_token_may_lie_in_any_block():
    logits = torch.randn(200, 900, generator=torch.Generator().manual_seed(0))
    tally = Tally(torch.zeros(200, dtype=torch.int64))
    for start in range(0, 900, 250):
        tally.add(start, logits[:, start : start + 250])
    assert torch.equal(tally.token, logits.argmax(dim=-1))


MEASURE = """
import sys
from pathlib import Path
from vlm.graft.verify import verify

def memory(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

small, big = [sys.argv[1:4], sys.argv[4:7]]
assert verify(*small).holds  # all that is loaded once is loaded now
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = memory("VmRSS:")
assert verify(*big).holds
print(memory("VmHWM:") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_holds_a_layer_and_not_the_model(made, tmp_path):
    raw = read_json(made[1] / "config.json") | {
        **{"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 24},
        **{"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64},
        **{"tie_word_embeddings": True, "torch_dtype": "bfloat16"},
    }
    model = LanguageModel(parse_text_config(raw)).bfloat16()
    randomise(model)
    save_model(tmp_path / "llm", model.state_dict().items(), made[1], raw)
    del model
    build(made[2], tmp_path / "llm", tmp_path / "hybrid")
    size = (tmp_path / "llm" / "model.safetensors").stat().st_size
    assert size > 190e6
    pairs = (*made, tmp_path / "hybrid", tmp_path / "llm", made[2])
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, pairs)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.splitlines()[-1]) < 0.5 * size
