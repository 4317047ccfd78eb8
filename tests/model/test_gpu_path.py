"""What runs on a GPU alone, forced to run here: padded widths, compiled blocks."""

import inspect
import sys
import types
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters

import vlm.layers
from tests.packing import make_sample, pack
from tests.tiny import hybrid
from vlm.attention import BACKENDS
from vlm.batch import Batch, Segments
from vlm.compile import ROUNDING, compile_blocks
from vlm.config import VLMConfig
from vlm.generate import generate
from vlm.layers import RMSNorm, padding
from vlm.loss import cross_entropy_sum
from vlm.model import VisionLanguageModel

IMAGE, START, END = 4012, 4009, 4010
RAGGED = [
    [(9, []), (5, [(1, 4, 4)]), (12, [(1, 10, 18), (1, 6, 14)])],
    [(30, [(1, 8, 8)])],
    [(17, []), (3, [])],
    [(44, [(1, 12, 4)]), (2, [(1, 2, 2)]), (61, [])],
]
"""Texts' lengths and grids of the samples of each micro-batch."""
POLICIES = [("none", "none"), ("pointwise", "full"), ("full", "pointwise")]


def micro_batches(config: VLMConfig) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    special = {"image": IMAGE, "start": START, "end": END}
    return [
        pack([(*make_sample(n, g, generator, **special), g) for n, g in samples], config, IMAGE)
        for samples in RAGGED
    ]


def step(model: VisionLanguageModel, batch: Batch) -> dict[str, Tensor]:
    """Gradients and the loss."""
    model.zero_grad()
    loss = cross_entropy_sum(model(batch), model.head_weight, batch.targets)
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()} | {"loss": loss.detach()}


def assert_alike(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 5e-6 * value.norm(), name


# ---- widths that are no multiple of 8


def test_only_a_gpu_pads_and_only_what_needs_it():
    assert padding(3420, "cuda") == 36  # of the 7B donor; 32B and 72B have 3456
    assert padding(3456, "cuda") == padding(12288, "cuda") == padding(3420, "cpu") == 0


@pytest.mark.parametrize("policies", POLICIES, ids="-".join)
def test_padding_changes_nothing(monkeypatch, policies):
    model = hybrid()
    model.set_recompute(*policies)
    batch = micro_batches(model.config)[0]
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    expected = step(model, batch)
    widths = []

    def padded(width: int, _device_type: str) -> int:
        widths.append(width)
        return 28

    monkeypatch.setattr(vlm.layers, "padding", padded)
    assert_alike(step(model, batch), expected)
    vision, text = model.config.vision, model.config.text
    assert set(widths) == {vision.intermediate_size, text.intermediate_size}
    assert {name: value.shape for name, value in model.state_dict().items()} == shapes


def test_what_is_padded_is_the_weights_and_not_what_they_multiply(monkeypatch):
    seen = []
    real = F.linear
    monkeypatch.setattr(vlm.layers, "padding", lambda *_: 4)
    monkeypatch.setattr(F, "linear", lambda x, w, b=None: seen.append(w.shape) or real(x, w, b))
    vlm.layers.SwiGLU(6, 12, bias=True)(torch.randn(5, 6))
    assert seen == [(16, 6), (16, 6), (6, 16)]


# ---- torch's own attention, whose versions differ


@pytest.mark.parametrize("knows_groups", [True, False], ids=["torch 2.13", "torch 2.11"])
@pytest.mark.parametrize("causal", [True, False])
def test_grouped_queries_with_and_without_enable_gqa(monkeypatch, knows_groups, causal):
    """Its kernel is a GPU's; another stands in that asks for equal heads unless told."""
    segments = Segments.of([5, 3])

    def kernel(q, k, v, cu_q, cu_k, max_q, max_k, *, window_size, enable_gqa=False):
        assert (k.shape[1] == q.shape[1]) != enable_gqa
        assert (max_q, max_k) == (5, 5) and cu_q is cu_k is segments.cu_seqlens
        return BACKENDS["sdpa"](q, k, v, segments, window_size == (-1, 0))

    def older(q, k, v, cu_q, cu_k, max_q, max_k, *, window_size):
        return kernel(q, k, v, cu_q, cu_k, max_q, max_k, window_size=window_size)

    kernels = types.SimpleNamespace(varlen_attn=kernel if knows_groups else older)
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", kernels)
    q, k, v = torch.randn(8, 4, 16), torch.randn(8, 2, 16), torch.randn(8, 2, 16)
    expected = BACKENDS["sdpa"](q, k, v, segments, causal)
    torch.testing.assert_close(BACKENDS["torch_varlen"](q, k, v, segments, causal), expected)


def test_a_kernels_signature_is_read_once(monkeypatch):
    """It takes longer than a launch."""
    read = []

    def kernel(q, k, v, *_, window_size, enable_gqa):
        read.append("called")
        return q

    kernels = types.SimpleNamespace(varlen_attn=kernel)
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", kernels)
    signature = inspect.signature
    monkeypatch.setattr(inspect, "signature", lambda f: read.append("read") or signature(f))
    q, k = torch.randn(8, 4, 16), torch.randn(8, 2, 16)
    for _ in range(3):
        BACKENDS["torch_varlen"](q, k, k, Segments.of([5, 3]), True)
    assert read == ["read"] + 3 * ["called"]


# ---- compiled blocks


@pytest.fixture
def compiler(monkeypatch) -> Iterator[None]:
    """A compiler that has compiled nothing."""
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)  # of tests that import DeepSpeed
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(recompile_limit=1):  # which will not do, unless it is raised
        yield
    torch._dynamo.reset()


def run_all(model: VisionLanguageModel) -> None:
    """Every micro-batch under every policy, beside a model that is not compiled."""
    eager = hybrid()
    for batch in micro_batches(model.config):
        expected = step(eager, batch)
        for policies in POLICIES:
            model.set_recompute(*policies)
            assert_alike(step(model, batch), expected)
    assert counters["stats"]["unique_graphs"] == 4  # two pieces of each tower


def test_lengths_change_and_nothing_is_compiled_again(compiler):
    model = hybrid()
    names = list(model.state_dict())
    compile_blocks(model, backend="aot_eager")
    assert list(model.state_dict()) == names
    run_all(model)
    assert not counters["graph_break"]
    with torch.no_grad():
        for batch in micro_batches(model.config):
            model(batch)
    assert counters["stats"]["unique_graphs"] == 8  # once more for evaluation


PARTLY = {
    "all": ("",),
    "last layer": ("layers.2.", "merger."),
    "last block": ("blocks.3.", "language_model"),
}
"""What trains: parts of parameters' names."""
GRAPHS = {"all": (4, 4), "last layer": (6, 4), "last block": (6, 6)}
"""Of a run, for training and for evaluation: two pieces of each tower, and two more of one whose
last block alone trains. A tower of which nothing trains is evaluated all the time."""


SLOW = pytest.mark.slow  # compiling takes ten seconds


@pytest.mark.parametrize(
    "case", [pytest.param("all", marks=SLOW), "last layer", pytest.param("last block", marks=SLOW)]
)
def test_few_rows_and_generation_compile_nothing(compiler, case):
    """Neither no target or one, nor answers in mid-run; and no piece gives up being compiled."""
    model = hybrid()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in PARTLY[case]))
    compile_blocks(model, backend="aot_eager")
    batches = micro_batches(model.config)
    few = [
        replace(batch, target_rows=batch.target_rows[:n], targets=batch.targets[:n])
        for batch in batches[:2]
        for n in (0, 1, 2)
    ]

    def compiled() -> int:
        assert counters["frames"]["total"] == counters["frames"]["ok"]
        return counters["stats"]["unique_graphs"]

    def train(batches: list[Batch]) -> None:
        for batch in batches:
            cross_entropy_sum(model(batch), model.head_weight, batch.targets).backward()

    training, evaluation = GRAPHS[case]
    train(batches)
    assert compiled() == training
    train(few)
    assert compiled() == training
    with torch.no_grad():
        for batch in batches + few:
            model(batch)
        assert compiled() == training + evaluation
        for batch in batches:
            generate(model, batch, max_new_tokens=4, stop_ids=())
    train(batches)
    assert compiled() == training + evaluation


@pytest.mark.slow
def test_fused_kernels_give_the_same_gradients(compiler):
    model = hybrid()
    compile_blocks(model)
    run_all(model)


def test_fused_kernels_round_as_the_donors_do(compiler):
    """Bit for bit; without the option one value of four differs."""
    norm = RMSNorm(96).bfloat16()
    with torch.no_grad():
        norm.weight.normal_(1.0, 0.3)
    x, y = torch.randn(2, 64, 96).bfloat16() * 3

    def both(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return norm(x), vlm.layers._gated(x, y)

    with torch.no_grad():
        fused = torch.compile(both, dynamic=True, options=ROUNDING)(x, y)
        assert all(map(torch.equal, fused, both(x, y)))
