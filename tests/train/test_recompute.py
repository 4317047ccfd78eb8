"""Recompute policies in whole runs: not one bit of a weight changes, ZeRO-2 included."""

from tests.train.runs import OPTIONS, run_plain, run_ranks, same, weights_of
from vlm.model import VisionLanguageModel

POINTWISE = {"gradient_checkpointing": "pointwise"}


def test_one_process(setting, plain_run, tmp_path, monkeypatch):
    expected = weights_of(plain_run, OPTIONS["max_steps"])  # keeps everything
    honest, used = VisionLanguageModel.set_recompute, []

    def note(model, *policies) -> None:
        used.append(policies)
        honest(model, *policies)

    monkeypatch.setattr(VisionLanguageModel, "set_recompute", note)
    for options, policies in (
        (POINTWISE, ("pointwise", "pointwise")),
        ({"gradient_checkpointing": True}, ("full", "full")),
        (POINTWISE | {"vit_gradient_checkpointing": "full"}, ("full", "pointwise")),
        ({"vit_gradient_checkpointing": True}, ("full", "none")),
    ):
        run = run_plain(setting, tmp_path / "-".join(policies), **options)
        assert used.pop() == policies
        assert same(weights_of(run, OPTIONS["max_steps"]), expected), policies


def test_two_ranks(setting, two_rank_run, tmp_path):
    run = run_ranks(setting, tmp_path / "run", 2, dataloader_num_workers=1, **POINTWISE)
    expected = weights_of(two_rank_run, OPTIONS["max_steps"])
    assert same(weights_of(run, OPTIONS["max_steps"]), expected)
