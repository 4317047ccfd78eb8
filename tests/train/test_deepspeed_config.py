"""What DeepSpeed is told, and what of its files is refused in one sentence."""

import json

import pytest
import torch

from tests.train.runs import ROOT
from train.config import TrainConfig, UsageError
from train.deepspeed_config import deepspeed_config
from train.engine import check_engine
from train.world import World


@pytest.fixture
def settings_of(tmp_path):
    """What becomes of a file."""

    def read(text: str) -> dict:
        file = tmp_path / "ds.json"
        file.write_text(text)
        return deepspeed_config(TrainConfig("m", ["d.jsonl"], "o", deepspeed=str(file)), 2)

    return read


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"zero_optimization": {"stage": 3}}', "asks for ZeRO stage 3, which cannot be used"),
        ('{"zero_optimization": {"stage": 0}}', "asks for ZeRO stage 0; take 1 or 2"),
        (
            '{"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}',
            "offloads the optimizer to 'nvme'; only 'cpu' is supported",
        ),
        ("{", "is none of zero1, zero2, zero2_offload, nor a file of DeepSpeed's JSON"),
        ("[]", "no file of DeepSpeed's JSON: it, zero_optimization and"),
        ('{"zero_optimization": 2}', "no file of DeepSpeed's JSON: it, zero_optimization and"),
        ('{"zero_optimization": {"offload_optimizer": true}}', "no file of DeepSpeed's JSON"),
        ('{"gradient_predivide_factor": 4.0}', "cannot with stage 2's reduce_scatter"),
        ('{"prescale_gradients": true}', "cannot with stage 2's reduce_scatter"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused(settings_of, text, says):
    with pytest.raises(UsageError, match=says) as error:
        settings_of(text)
    assert "\n" not in str(error.value) and "ds.json" in str(error.value)


def test_what_a_file_may_decide(settings_of):
    """How DeepSpeed works, and neither what a step is nor the schedule."""
    theirs = {"zero_optimization": {"stage": 1, "overlap_comm": True, "reduce_bucket_size": "auto"}}
    theirs |= {"train_batch_size": 77, "scheduler": {"type": "WarmupLR"}, "fp16": {"enabled": True}}
    theirs |= {"prescale_gradients": True, "gradient_clipping": "auto"}
    settings = settings_of(json.dumps(theirs))
    assert settings["zero_optimization"] == {"stage": 1, "overlap_comm": True}
    assert settings["prescale_gradients"] is True and settings["train_batch_size"] == 4
    assert settings["gradient_clipping"] == 1.0 and not {"scheduler", "fp16"} & set(settings)


def test_null_is_as_if_it_was_left_out(settings_of):
    settings = settings_of('{"zero_optimization": {"offload_optimizer": null}, "amp": null}')
    assert settings == settings_of("{}") == settings_of('{"zero_optimization": null}')


def test_scaling_before_the_sum_is_taken_where_deepspeed_can(settings_of):
    zero = {"stage": 2, "reduce_scatter": False}
    theirs = {"zero_optimization": zero, "gradient_predivide_factor": 4.0}
    assert settings_of(json.dumps(theirs))["gradient_predivide_factor"] == 4.0


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("zero3", "zero3 asks for ZeRO stage 3, which cannot be used: it spreads the weights"),
        ("none", "none is no setting; for no DeepSpeed write null"),
        ("False", "False is no setting; for no DeepSpeed write null"),
        ("zero5", "zero5 is none of zero1, zero2, zero2_offload, nor a file"),
    ],
)
def test_a_word_that_is_no_setting_is_answered(name, says):
    with pytest.raises(UsageError, match=says) as error:
        check_engine(TrainConfig("m", ["d.jsonl"], "o", deepspeed=name), World.start())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("theirs", "says"),
    [
        ({"zero_optimization": {"foo": 1}}, "refused by DeepSpeed: foo: Extra inputs are not"),
        ({"zero_optimization": {"reduce_bucket_size": -1}}, "refused by DeepSpeed: reduce_bucket"),
        ({"gradient_clipping": 1, "data_types": {}, "zero_optimization": {"stage": 1}}, None),
        ({"activation_checkpointing": 3}, "ds.json is refused by DeepSpeed"),
    ],
)
def test_deepspeed_is_asked_before_anything_is_loaded(tmp_path, theirs, says):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(theirs))
    config = TrainConfig("m", ["d.jsonl"], "o", deepspeed=str(file))
    world = World(0, 1, torch.device("cpu"), launched=True)
    if says is None:
        return check_engine(config, world)
    with pytest.raises(UsageError, match=says) as error:
        check_engine(config, world)
    assert "\n" not in str(error.value) and "ds.json" in str(error.value)


def test_offloading_needs_deepspeed():
    config = TrainConfig("m", ["d.jsonl"], "o", deepspeed="zero2_offload")
    with pytest.raises(UsageError, match="zero2_offload needs torchrun"):
        check_engine(config, World.start())


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_zero_accumulates_and_communicates_in_float32(dtype):
    """DeepSpeed's own default for bfloat16 communicates in bfloat16."""
    settings = deepspeed_config(TrainConfig("m", ["d.jsonl"], "o", dtype=dtype), 2)
    assert settings["zero_optimization"]["stage"] == 2
    assert settings["communication_data_type"] == "fp32"
    assert settings["data_types"] == {"grad_accum_dtype": "fp32"}
    assert settings["managed_gradient_accumulation"] is False
    assert ("bf16" in settings) == (dtype == "bfloat16")
    assert str(ROOT) not in json.dumps(settings)
