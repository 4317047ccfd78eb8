"""What a run says of how it was started."""

import sys

import pytest
import torch

from train.provenance import provenance
from train.world import World

LAUNCHED = {
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_WORLD_SIZE": "2",
    "GROUP_RANK": "0",
    "MASTER_ADDR": "first",
    "MASTER_PORT": "29500",
}


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (2, ""),
        (4, " --nnodes 2 --node_rank 0 --master_addr first --master_port 29500"),
    ],
)
def test_the_command_may_be_typed_again(monkeypatch, size, words):
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["train/sft.py", "--run_name", "a b"])
    world = World(0, size, torch.device("cpu"), launched=True)
    command = f"torchrun --nproc_per_node 2{words} train/sft.py --run_name 'a b'"
    assert provenance(world)["command"] == command
