"""tools/install.sh: which torch it takes, when it does nothing, and what it says when it fails.

A stub stands in for Python and pip: it records what is asked of it, and refuses what the test
says cannot be downloaded. The script itself runs as it is.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# Answers as Python 3.12 would, makes environments whose python is the stub again, keeps a record.
STUB = r"""#!/usr/bin/env bash
arguments="$*"
case "$arguments" in
    "-m venv --clear "*)
        rm -rf "$4"
        mkdir -p "$4/bin"
        ln -s "$(readlink -f "$0")" "$4/bin/python" ;;
    *"-m pip"*)
        echo "${arguments#*install --quiet }" >> pip.log
        if [ -n "$REFUSED" ] && [[ "$arguments" =~ $REFUSED ]]; then
            echo "ERROR: no such package" >&2
            exit 1
        fi ;;
    *version_info*) exit "${TOO_OLD:-0}" ;;
    *ensurepip*) exit "${NO_VENV:-0}" ;;
    *torch.version.cuda*) echo "2.13.0 $CUDA" ;;
    *) echo "Python 3.12.0" ;;
esac
"""


class Project:
    """A copy of what the script reads, with a PATH that holds the stubs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in (
            "requirements.txt",
            "requirements-cpu.txt",
            "requirements-gpu.txt",
            "requirements-vlmevalkit.txt",
            "requirements-swift.txt",
            "setup.py",
            "pyproject.toml",
            "tools/install.sh",
            "serve/cpu_shims/install.py",
        ):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
        self.add_command("python3", STUB)
        self.add_command("nvidia-smi", "#!/bin/sh\nexit 9\n")

    def add_command(self, name: str, script: str) -> None:
        file = self.folder / "commands" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(script, encoding="utf-8")
        file.chmod(0o755)

    def install(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
        (self.folder / "pip.log").write_text("", encoding="utf-8")
        path = f"{self.folder / 'commands'}{os.pathsep}{os.environ['PATH']}"
        environment = {"PATH": path, "REFUSED": "", "CUDA": "None", **variables}
        return subprocess.run(
            ["bash", "tools/install.sh", *arguments],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
        )

    @property
    def asked_of_pip(self) -> list[str]:
        return (self.folder / "pip.log").read_text(encoding="utf-8").splitlines()


@pytest.fixture
def project(tmp_path) -> Project:
    return Project(tmp_path)


def test_without_a_gpu_a_cpu_torch_comes_before_everything_that_needs_torch(project):
    assert project.install().returncode == 0
    asked = project.asked_of_pip
    torch = next(n for n, line in enumerate(asked) if "torch==2.13.0+cpu" in line)
    rest = next(n for n, line in enumerate(asked) if "requirements.txt" in line)
    assert torch < rest
    assert any("--editable ." in line for line in asked)


def test_where_the_configured_index_has_no_cpu_build_pytorchs_own_is_asked(project):
    result = project.install(REFUSED=r"\+cpu")
    assert result.returncode == 0
    assert any(f"--index-url {CPU_INDEX} torch==2.13.0" in line for line in project.asked_of_pip)
    assert "ERROR" not in result.stderr


def test_with_a_gpu_the_plain_torch_is_taken(project):
    project.add_command("nvidia-smi", "#!/bin/sh\necho 'GPU 0: one'\necho 'GPU 1: another'\n")
    assert project.install(CUDA="13.0").returncode == 0
    torch = [line for line in project.asked_of_pip if "torch==" in line]
    assert [line.split()[-1] for line in torch] == ["torch==2.13.0"]
    assert "--index-url" not in torch[0]


def test_with_a_gpu_a_torch_without_cuda_is_an_error(project):
    project.add_command("nvidia-smi", "#!/bin/sh\necho 'GPU 0: one'\n")
    result = project.install(CUDA="None")
    assert result.returncode != 0
    assert "without CUDA" in result.stderr and "TORCH_INDEX=" in result.stderr


def test_an_index_of_ones_own_is_used_and_remembered(project):
    assert project.install(TORCH_INDEX="https://example.org/whl").returncode == 0
    torch = [line for line in project.asked_of_pip if "torch==" in line]
    assert torch == ["--no-deps --retries 2 --index-url https://example.org/whl torch==2.13.0"]
    assert "up to date" in project.install().stdout
    assert project.asked_of_pip == []


def test_the_second_time_nothing_is_installed_until_a_requirement_changes(project):
    assert project.install().returncode == 0
    assert "up to date" in project.install().stdout
    assert project.asked_of_pip == []
    with (project.folder / "requirements.txt").open("a", encoding="utf-8") as file:
        file.write("another==1.0\n")
    assert project.install().returncode == 0
    assert project.asked_of_pip


def test_an_installation_that_broke_off_is_begun_again(project):
    assert project.install(REFUSED=r"-r requirements").returncode != 0
    assert project.install().returncode == 0
    assert project.asked_of_pip


def test_vlmevalkit_has_an_environment_of_its_own_with_a_cpu_torch(project):
    project.add_command("nvidia-smi", "#!/bin/sh\necho 'GPU 0: one'\n")
    result = project.install("vlmevalkit")
    assert result.returncode == 0, result.stderr
    asked = project.asked_of_pip
    torch = next(n for n, line in enumerate(asked) if "torch==2.13.0+cpu" in line)
    rest = next(n for n, line in enumerate(asked) if "-r requirements-vlmevalkit.txt" in line)
    headless = next(n for n, line in enumerate(asked) if "opencv-python-headless==" in line)
    assert torch < rest < headless
    assert not any("requirements.txt" in line or "--editable" in line for line in asked)
    assert not (project.folder / ".venv").exists()
    assert ".venv-vlmevalkit is up to date" in project.install("vlmevalkit").stdout
    assert project.install(CUDA="13.0").returncode == 0
    assert ".venv-vlmevalkit is up to date" in project.install("vlmevalkit").stdout


def test_ms_swift_has_an_environment_of_its_own_with_a_cpu_torch(project):
    project.add_command("nvidia-smi", "#!/bin/sh\necho 'GPU 0: one'\n")
    assert project.install("swift").returncode == 0
    asked = project.asked_of_pip
    torch = next(n for n, line in enumerate(asked) if "torch==2.13.0+cpu" in line)
    rest = next(n for n, line in enumerate(asked) if "-r requirements-swift.txt" in line)
    assert torch < rest
    assert not any("opencv" in line for line in asked)
    assert ".venv-swift is up to date" in project.install("swift").stdout


def test_an_environment_that_there_is_not(project):
    result = project.install("vlmeval")
    assert result.returncode == 1
    assert result.stderr == (
        "install: error: there is no environment vlmeval; there are vlmevalkit and swift.\n"
    )


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"PYTHON": "no-such-python"}, "PYTHON=no-such-python is not a command here"),
        ({"PYTHON": "python3", "TOO_OLD": "1"}, "Python 3.11 or newer is needed"),
        ({"PYTHON": "python3", "NO_VENV": "1"}, "install its venv module"),
        ({"REFUSED": "torch=="}, f"check that {CPU_INDEX} can be reached"),
        (
            {"REFUSED": "torch==", "TORCH_INDEX": "https://example.org/whl"},
            "TORCH_INDEX=https://example.org/whl",
        ),
        ({"REFUSED": "-r requirements"}, "check the network"),
    ],
)
def test_a_failure_says_what_to_do_in_one_sentence(project, variables, sentence):
    result = project.install(**variables)
    assert result.returncode == 1
    errors = [line for line in result.stderr.splitlines() if "install: error:" in line]
    assert len(errors) == 1
    assert sentence in errors[0]
