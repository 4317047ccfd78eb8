"""train/launch.sh: the recipe's environment becomes torchrun's flags."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.train.runs import ROOT


def tool(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.fixture
def launch(tmp_path):
    """Runs the script with a torchrun that prints its arguments, on a machine of 4 GPUs."""
    tool(tmp_path, "torchrun", 'printf "%s\\n" "$@"')
    tool(tmp_path, "nvidia-smi", "seq 4")

    def run(**variables: str) -> list[str]:
        names = ("NNODES", "NODE_RANK", "NPROC_PER_NODE", "MASTER_ADDR", "MASTER_PORT")
        inherited = {k: v for k, v in os.environ.items() if k not in names}
        path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
        done = subprocess.run(
            [ROOT / "train" / "launch.sh", "--config", "a file.yaml"],
            env=inherited | path | variables,
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.splitlines()

    return run


def flags(arguments: list[str]) -> dict[str, str]:
    place = arguments.index(str(ROOT / "train" / "sft.py"))
    assert arguments[place + 1 :] == ["--config", "a file.yaml"]
    return dict(zip(arguments[:place:2], arguments[1:place:2], strict=True))


def test_the_environment_becomes_flags(launch):
    node = {"NNODES": "2", "NODE_RANK": "1", "NPROC_PER_NODE": "8"}
    given = flags(launch(**node, MASTER_ADDR="host", MASTER_PORT="1234"))
    assert given == {
        "--nnodes": "2",
        "--node_rank": "1",
        "--nproc_per_node": "8",
        "--master_addr": "host",
        "--master_port": "1234",
    }


def test_alone_it_starts_a_process_per_gpu(launch):
    given = flags(launch())
    assert (given["--nnodes"], given["--node_rank"], given["--nproc_per_node"]) == ("1", "0", "4")
