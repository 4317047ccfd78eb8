"""What README says is true: its commands run, its files exist, its tree leaves none out.

The commands run as they stand, in a folder that holds tiny donors, data and an image under the
names that README uses. Only what would take 8 GPUs and days is made small: see SMALLER.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.eval.known_endpoint import knowing
from tests.tiny import write_llm_donor, write_vision_donor

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
ROOMS = ("vlm", "train", "serve", "eval", "examples", "bench", "tests")
RUNS = ("python", "torchrun")
NEEDS_THE_NETWORK = ("git", "cd", "hf")
SMALLER = (
    "--max_steps 2 --gradient_accumulation_steps 1 --dtype float32 "
    "--dataloader_num_workers 0 --dataset_num_proc 1"
)
MADE_BY_COMMANDS = ("runs/", "models/", "donors/", "data/", ".venv/")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[str]:
    """The commands of the bash blocks, continued lines joined and comments left out."""
    joined = "\n".join(blocks(text, "bash")).replace("\\\n", " ")
    lines = (re.sub(r"\s+#.*", "", line).strip() for line in joined.splitlines())
    return [" ".join(line.split()) for line in lines if line and not line.startswith("#")]


def tree_files() -> list[str]:
    """Paths in README's file tree and in that of tests/README.md.

    A folder ends with a slash and holds what is indented below it.
    """
    text = README + (ROOT / "tests/README.md").read_text(encoding="utf-8")
    trees = re.findall(r"<!-- tree -->\n```\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    folders: list[str] = []
    files = []
    for line in "".join(trees).splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        name, _, purpose = line.strip().partition(" ")
        assert purpose.strip(), f"the tree says nothing about {name}"
        path = "".join(folders[:depth]) + name
        if name.endswith("/"):
            folders[depth:] = [name]
        else:
            files.append(path)
    return files


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory) -> Path:
    """A folder like the project's, with README's donors, data and image in place."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("vlm", "train", "serve", "eval", "configs"):
        (folder / name).symlink_to(ROOT / name)
    for command in commands(README):
        if command.startswith("hf download"):
            name, target = re.search(r"download (\S+) --local-dir (\S+)", command).groups()
            write = write_vision_donor if "VL" in name else write_llm_donor
            (folder / target).parent.mkdir(parents=True, exist_ok=True)
            write(folder / target)
    sample = blocks(README, "json")[0]
    data = folder / "data/train.jsonl"
    data.parent.mkdir()
    data.write_text(f"{json.dumps(json.loads(sample))}\n" * 12, encoding="utf-8")
    for image in json.loads(sample)["images"]:
        (data.parent / image).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / "tests/golden/images/sq56.png", data.parent / image)
    vllm = folder / "commands" / "vllm"  # a stand-in: the real one takes half a minute to start
    vllm.parent.mkdir()
    source = (ROOT / "tests/serve/fake_vllm.py").read_text(encoding="utf-8")
    vllm.write_text(f"#!{sys.executable}\n{source}", encoding="utf-8")
    vllm.chmod(0o755)
    return folder


def run(command: str, folder: Path) -> subprocess.CompletedProcess:
    """A command line, with this interpreter's own python and torchrun first on the PATH."""
    stand_in = folder / "commands"
    path = os.pathsep.join([str(stand_in), str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env={**os.environ, "PATH": path, "FAKE_RECORD": str(stand_in / "record.json")},
        capture_output=True,
        text=True,
    )


def test_the_commands_run_in_their_order(sandbox):
    """From two donors to a chat: every python and torchrun line of README, one after the other."""
    done = []
    for command in commands(README):
        if command.startswith(RUNS):
            if command.startswith("torchrun"):
                command = command.replace("--nproc_per_node 8", "--nproc_per_node 2")
                command = f"{command} {SMALLER}"
            if "serve/parity.py" in command:
                command += " --engines transformers"  # vLLM: tests/serve/test_parity.py
            if "serve/launch.py" in command:
                command = f"timeout --preserve-status --signal INT 10 {command}"
            with knowing({"": "A cat on a chair."}) as endpoint:  # for what would serve a model
                there = f"--api_base {endpoint.url} --model fake-vl"
                result = run(command.replace("--serve exports/my-vlm", there), sandbox)
            output = f"{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
            assert result.returncode == 0, f"{command}\n{output}"
            done.append(command)
    scripts = ("vlm.graft build", "vlm.graft verify", "stage1", "stage2")
    scripts += tuple(f"serve/{name}.py" for name in ("export", "parity", "chat", "launch"))
    scripts += ("eval/run.py",)
    for script in scripts:
        assert any(script in command for command in done), f"README has no {script} command"


def test_a_wrong_flag_would_be_noticed(sandbox):
    (build,) = (command for command in commands(README) if "vlm.graft build" in command)
    assert run(f"{build} --no_such_flag 1", sandbox).returncode != 0


@pytest.mark.parametrize("name", ["README.md", "README_zh.md", "CONTRIBUTING.md"])
def test_every_other_command_is_a_target_of_the_makefile(name):
    for command in commands((ROOT / name).read_text(encoding="utf-8")):
        program = command.split()[0]
        if program == "make":
            assert run(f"{command} --dry-run", ROOT).returncode == 0, f"{name}: {command}"
        else:
            assert program in (*RUNS, *NEEDS_THE_NETWORK), f"{name}: who runs {command}?"


def test_the_chinese_commands_are_the_english_ones():
    chinese = commands((ROOT / "README_zh.md").read_text(encoding="utf-8"))
    assert chinese
    assert set(chinese) <= set(commands(README))


def test_the_file_tree_leaves_no_python_file_out_and_names_none_that_is_missing():
    listed = tree_files()
    existing = {
        path.relative_to(ROOT).as_posix()
        for room in ROOMS
        for path in (ROOT / room).rglob("*.py")
        if path.name != "__init__.py"
    } | {"setup.py"}
    assert sorted(existing - set(listed)) == [], "not in README's tree"
    assert [path for path in listed if not (ROOT / path).exists()] == [], "only in README's tree"
    assert len(listed) == len(set(listed))


@pytest.mark.parametrize("path", ["README.md", "README_zh.md", "CONTRIBUTING.md", "docs"])
def test_every_file_that_is_named_or_linked_exists(path):
    sources = sorted((ROOT / path).glob("*.md")) if (ROOT / path).is_dir() else [ROOT / path]
    for source in sources:
        text = source.read_text(encoding="utf-8")
        for name in re.findall(r"`([\w.-]+/[\w./*-]+)`", text):
            room = name.partition("/")[0]
            if name.startswith(MADE_BY_COMMANDS) or room not in (*ROOMS, "configs", "docs"):
                continue
            assert list(ROOT.glob(name.rstrip("/"))), f"{source.name} names {name}"
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (source.parent / target).exists(), f"{source.name} links to {target}"
