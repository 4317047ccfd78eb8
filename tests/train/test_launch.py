"""train/launch.sh and configs/slurm/sft.sbatch: environment to flags, and two nodes for real."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.train.runs import ROOT, command, environment, log_of, same, weights_of

NAMES = ("NNODES", "NODE_RANK", "NPROC_PER_NODE", "MASTER_ADDR", "MASTER_PORT", "SHUTDOWN_TIMEOUT")
HERE = str(Path(sys.executable).parent)
"""Where this interpreter's torchrun lies."""


def tool(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{script}\n")
    path.chmod(0o755)


def variables(path: str, **given: str) -> dict[str, str]:
    """The environment without what may be inherited from a job; `path` comes first."""
    inherited = {n: v for n, v in environment().items() if not n.startswith(("SLURM_", *NAMES))}
    return inherited | {"PATH": f"{path}:{HERE}:{os.environ['PATH']}"} | given


@pytest.fixture
def launch(tmp_path):
    """Runs the script with a torchrun that prints its arguments, on a machine of 4 GPUs."""
    tool(tmp_path, "torchrun", 'printf "%s\\n" "$@"')
    tool(tmp_path, "nvidia-smi", "seq 4")

    def run(**given: str) -> list[str]:
        done = subprocess.run(
            [ROOT / "train" / "launch.sh", "--config", "a file.yaml"],
            env=variables(str(tmp_path), **given),
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
    node = {"NNODES": "2", "NODE_RANK": "1", "NPROC_PER_NODE": "8", "SHUTDOWN_TIMEOUT": "60"}
    given = flags(launch(**node, MASTER_ADDR="host", MASTER_PORT="1234"))
    assert given == {
        "--nnodes": "2",
        "--node_rank": "1",
        "--nproc_per_node": "8",
        "--master_addr": "host",
        "--master_port": "1234",
        "--signals_to_handle": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
        "--shutdown_timeout": "60",
    }


def test_alone_it_starts_a_process_per_gpu(launch):
    given = flags(launch())
    assert (given["--nnodes"], given["--node_rank"], given["--nproc_per_node"]) == ("1", "0", "4")
    assert given["--shutdown_timeout"] == "300"


# --- two nodes, that are both this machine -------------------------------------------------------


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def arguments(setting: dict, out: Path, **options) -> list[str]:
    """What follows train/sft.py on a command line."""
    _, _, *rest = command(setting, out, 0, **options)
    return rest


@pytest.mark.slow
def test_two_launchers_train_as_one_with_two_ranks(setting, two_rank_run, tmp_path):
    node = {"NNODES": "2", "NPROC_PER_NODE": "1", "MASTER_PORT": str(free_port())}
    words = [str(ROOT / "train" / "launch.sh"), *arguments(setting, tmp_path / "run")]
    launchers = [
        subprocess.Popen(
            words,
            env=variables(HERE, NODE_RANK=str(rank), MASTER_ADDR="127.0.0.1", **node),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [launcher.communicate(timeout=300)[1] for launcher in launchers]
    finally:
        for launcher in launchers:
            launcher.kill()
    for launcher, error in zip(launchers, errors, strict=True):
        assert launcher.returncode == 0, error[-3000:]
    assert same(weights_of(tmp_path / "run", 6), weights_of(two_rank_run, 6))


def test_nothing_outlives_a_launcher_that_is_killed(setting, tmp_path):
    out = tmp_path / "run"
    words = command(setting, out, 2, max_steps=100_000, dataloader_num_workers=1)
    launcher = subprocess.Popen(words, env=environment(), stderr=subprocess.DEVNULL)
    wait_for_step(3, out, launcher)
    started = descendants(launcher.pid)
    launcher.kill()
    launcher.wait()
    assert len(started) >= 4  # two ranks with a data worker each
    deadline = time.monotonic() + 30
    while (alive := [pid for pid in started if lives(pid)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    for pid in alive:
        os.kill(pid, signal.SIGKILL)
    assert not alive, "ranks or data workers go on without their launcher"


def descendants(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [one for child in map(int, children) for one in (child, *descendants(child))]


def lives(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def wait_for_step(step: int, run: Path, process: subprocess.Popen) -> None:
    log = run / "log.jsonl"
    while not (log.exists() and f'"step": {step}' in log.read_text()):
        assert process.poll() is None, "it has ended"
        time.sleep(0.05)


# --- SLURM ---------------------------------------------------------------------------------------

SRUN = """
while [[ $1 == --* ]]; do shift; done
for node in 0 1; do
    SLURM_NODEID=$node "$@" &
    echo $! >> "$RECORD/launchers"
done
wait -n
wait -n
"""
SCONTROL = """
case $1 in
    show) [ "$3" = "here[0-1]" ] && printf '127.0.0.1\\n%.0s' {1..20000} ;; # a full pipe
    requeue) echo "$2" >> "$RECORD/requeued" ;;
esac
"""
SCANCEL = """
[ "$*" = "--signal=TERM $SLURM_JOB_ID.0" ] && kill -TERM $(cat "$RECORD/launchers")
"""


@pytest.fixture
def cluster(tmp_path):
    """Starts the batch script with stand-ins for SLURM's commands, as two nodes here."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    for name, script in (("srun", SRUN), ("scontrol", SCONTROL), ("scancel", SCANCEL)):
        tool(folder, name, script)
    job = {
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "here[0-1]",
        "SLURM_JOB_ID": str(free_port() - 20000),
        "SLURM_GPUS_ON_NODE": "1",
        "RECORD": str(folder),
    }

    def start(words: list[str]) -> subprocess.Popen:
        (folder / "launchers").unlink(missing_ok=True)
        return subprocess.Popen(
            ["bash", str(ROOT / "configs" / "slurm" / "sft.sbatch"), *words],
            cwd=ROOT,
            env=variables(str(folder), **job),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start, folder, job["SLURM_JOB_ID"]


@pytest.mark.slow
def test_a_job_whose_time_is_up_saves_and_is_queued_again(setting, cluster, tmp_path):
    start, folder, job = cluster
    out = tmp_path / "run"
    words = arguments(setting, out, max_steps=60)
    batch = start(words)
    wait_for_step(3, out, batch)
    batch.send_signal(signal.SIGUSR1)
    _, errors = batch.communicate(timeout=120)
    assert batch.returncode != 0
    assert (folder / "requeued").read_text().split() == [job], errors[-3000:]
    stopped = (out / "latest").read_text().strip()
    assert 3 <= int(stopped.split("-")[1]) < 60

    batch = start(words)
    _, errors = batch.communicate(timeout=240)
    assert batch.returncode == 0, errors[-3000:]
    assert (folder / "requeued").read_text().split() == [job]
    assert (out / "latest").read_text().strip() == "checkpoint-60"
    steps = [line["step"] for line in log_of(out) if line["event"] == "train"]
    assert steps == list(range(1, 61))


def test_the_batch_script_is_sound():
    script = ROOT / "configs" / "slurm" / "sft.sbatch"
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    lines = [s.split()[1] for s in script.read_text().splitlines() if s.startswith("#SBATCH")]
    given = dict(line[2:].partition("=")[::2] for line in lines)
    assert given["signal"] == "B:USR1@600" and "requeue" in given
    assert given["ntasks-per-node"] == "1"
