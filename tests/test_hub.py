"""Models by hub id: the real clients against a hub on this machine (tests/fake_hub.py)."""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from serve.chat import main as chat
from serve.launch import main as launch
from tests.fake_hub import fake_hub
from tests.tiny import write_hybrid
from tests.train.runs import command, log_of, write_data
from tests.train.runs import launch as run_command
from train.sft import main as train
from vlm.checkpoint import load_model
from vlm.hf_config import ConfigError
from vlm.hub import resolve_model

ROOT = Path(__file__).parent.parent
NOBODY = {"HF_ENDPOINT": "http://127.0.0.1:9", "MODELSCOPE_ENDPOINT": "http://127.0.0.1:9"}
SCRIPT = """
import sys
from vlm.hf_config import ConfigError
from vlm.hub import resolve_model
try:
    print(resolve_model(*sys.argv[1:]))
except ConfigError as error:
    print("error:", error)
"""


@pytest.fixture(scope="session")
def donor(tmp_path_factory):
    folder = write_hybrid(tmp_path_factory.mktemp("hub") / "donor")
    (folder / "pytorch_model.bin").write_bytes(b"pickled")
    return folder


@pytest.fixture
def hub(donor):
    with fake_hub() as hub:
        hub.add("owner/donor", donor)
        yield hub


@pytest.fixture(params=["huggingface", "modelscope"])
def client(request):
    if request.param == "modelscope":
        pytest.importorskip("modelscope", reason="its client is not installed")
    return request.param


def resolve(hub, folder: Path, *arguments: str, **variables: str) -> str:
    """What a process of its own finds or says, with its caches in `folder`."""
    hub.asked.clear()
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments],
        cwd=ROOT,
        env=os.environ | hub.environment(folder) | variables,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    return done.stdout.strip()


# --- what is no hub id ---------------------------------------------------------------------------


def test_a_directory_is_taken_as_it_is(tmp_path, monkeypatch):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_model("owner/name") == Path("owner/name")
    assert resolve_model(tmp_path / "owner", "modelscope") == tmp_path / "owner"


@pytest.mark.parametrize(
    "path", ["./owner/name", "../name", "/owner/name", "~/name", "a/b/c", "name", "owner\\name"]
)
def test_a_path_is_never_looked_for_on_a_hub(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="does not exist; give the directory of a model"):
        resolve_model(path)


def test_a_file_is_refused(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ConfigError, match=r"model\.safetensors is a file"):
        resolve_model(tmp_path / "model.safetensors")


# --- what comes from one -------------------------------------------------------------------------


def test_a_model_is_downloaded_once_and_then_read_from_the_cache(hub, client, donor, tmp_path):
    missing = resolve(hub, tmp_path, "owner/donor", client, HF_HUB_OFFLINE="1")
    assert missing.startswith("error: owner/donor is no directory here and not, or not whole, in")
    assert client in missing and "HF_HUB_OFFLINE" in missing and not hub.asked

    folder = Path(resolve(hub, tmp_path, "owner/donor", client))
    assert folder.is_relative_to(tmp_path)
    assert (folder / "tokenizer.json").read_bytes() == (donor / "tokenizer.json").read_bytes()
    assert not (folder / "pytorch_model.bin").exists()
    assert not any("pytorch_model" in line for line in hub.asked)
    ours, theirs = (load_model(f, torch.float32).state_dict() for f in (folder, donor))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours.keys() | theirs.keys())

    assert resolve(hub, tmp_path, "owner/donor", client) == str(folder)
    assert not hub.asked
    offline = NOBODY | {"HF_HUB_OFFLINE": "1"}
    assert resolve(hub, tmp_path, "owner/donor", client, **offline) == str(folder)


def test_a_revision_is_a_model_of_its_own(hub, client, donor, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(donor, other)
    (other / "merges.txt").write_text("of the tag")
    commit = hub.add("owner/donor", other, "v1.0")
    folder = Path(resolve(hub, tmp_path, "owner/donor@v1.0", client))
    assert (folder / "merges.txt").read_text() == "of the tag"
    assert folder.name == (commit if client == "huggingface" else "v1.0")
    main = Path(resolve(hub, tmp_path, "owner/donor", client))
    assert main != folder and not (main / "merges.txt").exists()


def test_without_a_network_huggingfaces_cache_still_serves(hub, tmp_path):
    folder = resolve(hub, tmp_path, "owner/donor")
    assert resolve(hub, tmp_path, "owner/donor", **NOBODY) == folder


def test_two_processes_at_once_share_one_download(hub, client, tmp_path):
    with ThreadPoolExecutor(2) as both:
        found = set(both.map(lambda _: resolve(hub, tmp_path, "owner/donor", client), range(2)))
    (folder,) = found
    load_model(Path(folder), torch.float32)


def test_a_download_that_broke_off_is_told_and_taken_up_again(hub, client, tmp_path):
    hub.drops["model.safetensors"] = 5000
    said = resolve(hub, tmp_path, "owner/donor", client)
    assert f"owner/donor is no directory here and could not be downloaded from {client}" in said
    hub.drops.clear()
    assert "not whole" in resolve(hub, tmp_path, "owner/donor", client, HF_HUB_OFFLINE="1")
    folder = Path(resolve(hub, tmp_path, "owner/donor", client))
    load_model(folder, torch.float32)
    resumes = " from 5000" if client == "modelscope" else ""
    got = [line for line in hub.asked if line.startswith("GET")]
    assert got == [f"GET model.safetensors{resumes}"]  # the other files had arrived


# --- what goes wrong -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reference", "answer", "expected"),
    [
        ("owner/missing", None, "owner/missing is neither a directory here nor a model that"),
        ("owner/donor@v9", None, ("owner/donor has no revision v9", "owner/donor@v9 is neither")),
        ("owner/donor", (403, "GatedRepo"), "gives owner/donor only to those"),
        ("owner/donor", (401, ""), "is neither a directory here nor a model"),
    ],
)
def test_what_a_hub_refuses_is_one_sentence(hub, client, reference, answer, expected, tmp_path):
    if answer:
        hub.answers["owner/donor"] = answer
    said = resolve(hub, tmp_path, reference, client)
    if isinstance(expected, tuple):
        expected = expected[client == "modelscope"]
    assert said.startswith("error: ") and expected in said and client in said


def test_no_network_is_one_sentence(hub, tmp_path):
    said = resolve(hub, tmp_path, "owner/donor", **NOBODY)
    assert "Connection refused" in said and "check the network" in said


@pytest.fixture
def small_disk(tmp_path):
    """A prefix for commands that gives them half a megabyte at tmp_path/small."""
    (tmp_path / "small").mkdir()
    mount = f"mount -t tmpfs -o size=500k tmpfs {tmp_path / 'small'}"
    prefix = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    try:
        subprocess.run([*prefix, mount], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this machine lets nobody mount a small disk")
    return [*prefix, f'{mount} && exec "$@"', "sh"]


def test_a_full_disk_is_one_sentence(hub, client, small_disk, tmp_path):
    done = subprocess.run(
        [*small_disk, sys.executable, "-c", SCRIPT, "owner/donor", client],
        cwd=ROOT,
        env=os.environ | hub.environment(tmp_path / "small"),
        capture_output=True,
        text=True,
    )
    assert done.stdout.startswith(f"error: owner/donor cannot be kept in {client}'s cache")
    assert "the disk is full" in done.stdout and done.stdout.count("\n") == 1


def test_a_client_that_is_not_installed_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "modelscope.hub.snapshot_download", None)
    with pytest.raises(ConfigError, match=r"pip install graftvl\[modelscope\]$"):
        resolve_model("owner/name", "modelscope")


# --- the commands --------------------------------------------------------------------------------


def test_a_command_says_it_and_ends_with_2(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given = ["--dataset", "data.jsonl", "--output_dir", "run", "--deepspeed", "null"]
    monkeypatch.setattr(sys, "argv", ["sft.py", "--model", "owner/missing", *given])
    (tmp_path / "data.jsonl").touch()
    for run in (lambda: chat(["owner/missing"]), lambda: launch(["owner/missing"]), train):
        assert run() == 2
        said = capsys.readouterr().err
        assert said.startswith("error: owner/missing is no directory") and said.count("\n") == 1


def test_ranks_download_once_and_resume_without_the_hub(hub, tmp_path):
    setting = {"model": "owner/donor", "dataset": [str(write_data(tmp_path))]}
    words = command(setting, tmp_path / "run", 2, max_steps=1, save_steps=1)
    done = run_command(words, **hub.environment(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"snapshots/{hub.commit('owner/donor', 'main')}" in done.stdout + done.stderr
    assert hub.asked.count("GET model.safetensors") == hub.lookups == 1
    assert [entry["step"] for entry in log_of(tmp_path / "run")] == [1]

    words = command(setting, tmp_path / "run", 2, max_steps=2, save_steps=1)
    shutil.rmtree(tmp_path / "hf")
    done = run_command(words, **hub.environment(tmp_path) | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr[-3000:]


def test_ranks_all_end_when_the_first_gets_no_model(hub, tmp_path):
    setting = {"model": "owner/missing", "dataset": [str(write_data(tmp_path))]}
    done = run_command(command(setting, tmp_path / "run", 2), **hub.environment(tmp_path))
    assert done.returncode != 0
    assert done.stderr.count("error: owner/missing is neither a directory here nor") == 1
