"""What trains: groups by name, and frozen tensors that a stage leaves as they were."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.model.test_cost import SMALL, addmm_flops, example, expected, on_meta
from tests.tiny import hybrid, hybrid_config
from tests.train.runs import OPTIONS, run_plain, weights_of
from train.config import TrainConfig, UsageError
from train.freeze import banner, freeze, trained_parts
from vlm.checkpoint import load_model
from vlm.cost import any_trains
from vlm.data.collate import collate
from vlm.hf_config import parse_config
from vlm.loss import cross_entropy_sum
from vlm.model import VisionLanguageModel

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


def test_each_part_has_its_rate_and_decay_and_norms_and_biases_do_not_decay():
    rates = {"learning_rate": 1e-3, "vit_lr": 0.0, "aligner_lr": 1e-2}
    decays = {"weight_decay": 0.25, "vit_weight_decay": 0.5, "aligner_weight_decay": 0.0}
    groups = freeze(hybrid(), config(**rates, **decays))
    expected = {"vit": (0.0, 0.5), "aligner": (1e-2, 0.0), "llm": (1e-3, 0.25)}
    assert len(groups) == 6
    for group in groups:
        part, kind = group.name.split("/")
        rate, decay = expected[part]
        assert group.learning_rate == rate
        assert group.weight_decay == (decay if kind == "decay" else 0.0)
        for name in group.parameters:
            alone = name.endswith(".bias") or "norm" in name or "ln_q" in name
            assert alone == (kind == "no_decay"), name


def test_the_banner_counts_what_trains():
    model = hybrid()
    options = config(
        freeze_vit=True, last_llm_layers=1, weight_decay=0.2, vit_weight_decay=0.3,
        trainable_parameters=["*.blocks.?.norm1.weight"], freeze_parameters=["lm_head.*"],
    )  # fmt: skip
    text = banner(model, freeze(model, options), options)
    lines = {line.split()[0]: line.split() for line in text.splitlines()}
    merger, layer = (
        [p.numel() for p in module.parameters()]
        for module in (model.visual.merger, model.language_model.layers[0])
    )
    norms = 4 * 64
    assert lines["aligner"][1:] == [f"{sum(merger):,}"] * 2 + ["5", "of", "5", "5e-06", "0.2"]
    assert lines["vit"][2:6] == [f"{norms:,}", "4", "of", "49"]
    assert lines["llm"][2:] == [f"{sum(layer) + 48:,}", "12", "of", "36", "5e-06", "0.2"]
    total = sum(p.numel() for p in model.parameters())
    assert lines["all"][1:3] == [f"{total:,}", f"{sum(merger) + sum(layer) + 48 + norms:,}"]
    assert lines["last_llm_layers:"] == ["last_llm_layers:", "1"]
    assert lines["trainable_parameters:"][1:] == ["*.blocks.?.norm1.weight", "(4", "tensors)"]
    assert lines["freeze_parameters:"][1:] == ["lm_head.*", "(1", "tensors)"]
    everything = banner(model, freeze(model, config(**STAGE_1)), config(**STAGE_1)).splitlines()
    assert everything[1].endswith("frozen") and len(everything) == 5


# ---- single layers and parameters


@pytest.mark.parametrize("tie", [False, True])
def test_the_last_layers_train_with_what_follows_them(tie):
    """Not with a head that is the embedding: it also stands before them."""
    model = hybrid(tie=tie)
    trained = set(names(freeze(model, config(last_vit_layers=1, last_llm_layers=2))))
    prefixes = ("model.visual.blocks.3.", "model.visual.merger.", "model.language_model.norm.")
    prefixes += tuple(f"model.language_model.layers.{n}." for n in (1, 2))
    expected = {n for n, _ in model.named_parameters() if n.startswith(prefixes)}
    assert trained == expected | (set() if tie else {"lm_head.weight"})


Q, EMBEDDING = "model.language_model.layers.2.self_attn.q_proj.weight", "embed_tokens.weight"
PRECEDENCE = [  # options, whether the last layer's queries train
    ({}, True),
    ({"freeze_llm": True}, False),
    ({"freeze_llm": True, "last_llm_layers": 1}, True),
    ({"last_llm_layers": 1, "freeze_parameters": ["*.q_proj.*"]}, False),
    ({"freeze_parameters": ["*.q_proj.*"], "trainable_parameters": [Q]}, True),
    ({"freeze_llm": True, "trainable_parameters": ["*layers.2.*"]}, True),
    ({"last_llm_layers": 2, "trainable_parameters": [f"*{EMBEDDING}"]}, True),
]


@pytest.mark.parametrize(("options", "trains"), PRECEDENCE)
def test_the_more_special_option_decides(options, trains):
    model = hybrid()
    assert (Q in names(freeze(model, config(**options)))) == trains


MISTAKES = {
    "freeze_parameters: visual.blocks.* matches no parameter (did you mean *visual.blocks.*": {
        "freeze_parameters": ["*.bias", "visual.blocks.*"]
    },
    "trainable_parameters: lm_heat.weight matches no parameter (the nearest is lm_head.weight)": {
        "trainable_parameters": ["lm_heat.weight"]
    },
    "last_vit_layers is 5, but the model has 4": {"last_vit_layers": 5},
    "last_llm_layers is 4, but the model has 3": {"last_llm_layers": 4},
    "no parameter is left to train": {"freeze_parameters": ["*"]},
}


@pytest.mark.parametrize("message", MISTAKES)
def test_a_mistake_is_told_before_weights_are_loaded(message):
    model, options = hybrid(), config(**MISTAKES[message])
    for refused in (
        lambda: trained_parts(options, model.config),
        lambda: freeze(model, options),
    ):
        with pytest.raises(UsageError) as caught:
            refused()
        assert str(caught.value).startswith(message)


def test_a_head_that_is_the_embedding_has_no_name_of_its_own():
    with pytest.raises(UsageError, match="the head is tied to"):
        freeze(hybrid(tie=True), config(freeze_parameters=["lm_head.weight"]))


def test_all_parts_frozen_is_an_error_unless_some_layers_train():
    frozen = {"freeze_vit": True, "freeze_llm": True, "freeze_aligner": True}
    with pytest.raises(UsageError, match="nothing to train"):
        config(**frozen)
    trained = names(freeze(hybrid(), config(**frozen, last_vit_layers=1)))
    assert trained and all(name.startswith("model.visual.blocks.3.") for name in trained)


@pytest.mark.parametrize("options", [STAGE_1, {}, *(options for options, _ in PRECEDENCE)])
def test_trained_parts_are_known_without_weights(options):
    """A part of which not all trains comes with the names of what does."""
    model = hybrid()
    trained = set(names(freeze(model, config(**options))))
    trains = trained_parts(config(**options), model.config)
    for name, _ in model.named_parameters():
        assert any_trains(name, trains) == (name in trained)
    assert trained_parts(config(**STAGE_1), model.config) == {"aligner"}
    assert trained_parts(config(), model.config) == {"vit", "aligner", "llm"}


LAST = {"last_vit_layers": 1, "last_llm_layers": 1, "freeze_parameters": ["*.mlp.up_proj.weight"]}


@pytest.mark.parametrize("options", [STAGE_1, {"freeze_aligner": True, "freeze_vit": True}, LAST])
def test_frozen_tensors_are_bit_identical_after_training(setting, tmp_path, options):
    """And every trained one has moved, text-only micro-batches among the others."""
    before = load_model(setting["model"])
    trained = set(names(freeze(before, config(**options))))
    one = {"per_device_train_batch_size": 1}
    after = weights_of(run_plain(setting, tmp_path / "run", **options, **one), OPTIONS["max_steps"])
    for name, tensor in before.state_dict().items():
        assert (tensor != after[name]).any() == (name in trained), name


def test_stage_1_computes_no_gradient_of_a_frozen_weight_and_none_in_the_vit():
    """Its FLOPs, as torch counts them, are the cost model's: of packed samples, with image and
    without."""
    model_config = parse_config(hybrid_config())
    with torch.device("meta"):
        model = VisionLanguageModel(model_config)
    freeze(model, config(**STAGE_1))
    samples = [SMALL, (50, [], 7), (90, [(1, 16, 16)], 40)]
    batch = on_meta(collate([example(model_config, sizes) for sizes in samples], model_config))
    in_place = {torch.ops.aten.addmm_: addmm_flops}
    outputs = []
    model.visual.blocks[-1].register_forward_hook(lambda *args: outputs.append(args[-1]))
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        hidden = model(batch)
        cross_entropy_sum(hidden, model.head_weight, batch.targets).backward()
    trained = [name for name, p in model.named_parameters() if p.grad is not None]
    assert trained == [name for name, _ in model.named_parameters() if ".merger." in name]
    assert not outputs[0].requires_grad
    costs = [expected(model_config, sizes, trained) for sizes in samples]
    assert counter.get_total_flops() == sum(costs)
