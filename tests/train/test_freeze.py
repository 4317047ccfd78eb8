"""What trains: groups by name, and frozen tensors that a stage leaves as they were."""

import pytest

from tests.tiny import hybrid
from tests.train.runs import OPTIONS, run_plain, weights_of
from train.config import TrainConfig, UsageError
from train.freeze import banner, freeze, trained_parts
from vlm.checkpoint import load_model

STAGE_1 = {"freeze_vit": True, "freeze_llm": True}


def config(**options) -> TrainConfig:
    return TrainConfig("model", ["data.jsonl"], "run", **options)


def names(groups) -> list[str]:
    return [name for group in groups for name in group.parameters]


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize(
    ("options", "prefixes"),
    [
        (STAGE_1, ("model.visual.merger.",)),
        ({"freeze_aligner": True, "freeze_llm": True}, ("model.visual.patch", "model.visual.bl")),
        ({"freeze_vit": True, "freeze_aligner": True}, ("model.language_model.", "lm_head.")),
        ({}, ("model.", "lm_head.")),
    ],
)
def test_each_part_is_frozen_by_its_own_flag(tie, options, prefixes):
    """The merger lies under `visual.`: freezing the ViT must not freeze it."""
    model = hybrid(tie=tie)
    trained = names(freeze(model, config(**options)))
    expected = [name for name, _ in model.named_parameters() if name.startswith(prefixes)]
    assert sorted(trained) == sorted(expected) and len(set(trained)) == len(trained)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (name in trained)


def test_a_part_that_was_frozen_can_train_again():
    model = hybrid()
    freeze(model, config(**STAGE_1))
    freeze(model, config())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_tied_head_is_frozen_and_trained_with_the_embedding():
    model = hybrid(tie=True)
    freeze(model, config(freeze_llm=True))
    assert not model.head_weight.requires_grad
    trained = names(freeze(model, config()))
    assert trained.count("model.language_model.embed_tokens.weight") == 1
    assert "lm_head.weight" not in trained


def test_norms_and_biases_do_not_decay():
    options = {"weight_decay": 0.25, "vit_lr": 1e-4, "aligner_lr": 1e-2, "learning_rate": 1e-3}
    groups = freeze(hybrid(), config(**options))
    rates = {"vit": 1e-4, "aligner": 1e-2, "llm": 1e-3}
    assert len(groups) == 6
    for group in groups:
        part, kind = group.name.split("/")
        assert group.learning_rate == rates[part]
        assert group.weight_decay == (0.25 if kind == "decay" else 0.0)
        for name in group.parameters:
            alone = name.endswith(".bias") or "norm" in name or "ln_q" in name
            assert alone == (kind == "no_decay"), name


def test_the_banner_counts_what_trains():
    model = hybrid()
    groups = freeze(model, config(**STAGE_1))
    lines = {line.split()[0]: line.split() for line in banner(model, groups).splitlines()[1:]}
    merger = sum(p.numel() for p in model.visual.merger.parameters())
    total = sum(p.numel() for p in model.parameters())
    assert lines["aligner"][1:] == [f"{merger:,}", f"{merger:,}", "5e-06"]
    assert lines["vit"][2:] == ["0", "frozen"] and lines["llm"][2:] == ["0", "frozen"]
    assert lines["all"][1:3] == [f"{total:,}", f"{merger:,}"]


def test_nothing_left_to_train_is_an_error():
    with pytest.raises(UsageError, match="nothing to train"):
        config(freeze_vit=True, freeze_llm=True, freeze_aligner=True)
    with pytest.raises(UsageError, match="no parameter is left"):
        freeze(hybrid().visual.blocks, config(freeze_llm=True))


def test_trained_parts_are_those_that_the_cost_model_counts():
    assert trained_parts(config(**STAGE_1)) == {"aligner"}
    assert trained_parts(config()) == {"vit", "aligner", "llm"}


@pytest.mark.parametrize("options", [STAGE_1, {"freeze_aligner": True, "freeze_vit": True}])
def test_frozen_tensors_are_bit_identical_after_training(setting, tmp_path, options):
    """And every trained one has moved, text-only micro-batches among the others."""
    before = load_model(setting["model"])
    trained = set(names(freeze(before, config(**options))))
    one = {"per_device_train_batch_size": 1}
    after = weights_of(run_plain(setting, tmp_path / "run", **options, **one), OPTIONS["max_steps"])
    for name, tensor in before.state_dict().items():
        assert (tensor != after[name]).any() == (name in trained), name
