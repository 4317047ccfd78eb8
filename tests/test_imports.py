"""Who may import whom, read from every file's import statements.

What a data worker loads in the end is watched by tests/data/test_worker_imports.py.
"""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("vlm", "train", "serve", "eval")
MAY_IMPORT = {
    "vlm": ("vlm",),
    "train": ("train", "vlm"),
    "serve": ("serve", "vlm"),
    "eval": ("eval", "vlm.data.formats", "vlm.data.schema", "vlm.page"),
}
# The few places that meet transformers; the model itself is torch and nothing else.
MAY_IMPORT_TRANSFORMERS = ("vlm/graft/proof_witness.py", "vlm/hf/", "vlm/vllm_model.py")
MAY_IMPORT_VLLM = (
    "vlm/vllm_plugin.py",
    "vlm/vllm_model.py",
    "vlm/vllm_media.py",
    "serve/vllm_view.py",
)


def python_files(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported_modules(source: str, package: str) -> set[str]:
    """Dotted names that a module of `package` imports anywhere, functions included.

    `from a import b` counts as `a.b`, which may be a module; relative imports are resolved.
    """
    modules: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*(parents if node.level else []), *filter(None, [node.module])])
            modules |= {f"{base}.{alias.name}" for alias in node.names}
    return modules


def is_inside(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def forbidden_imports(source: str, path: str) -> list[str]:
    """What a file at `path` (relative to the project) imports and must not."""
    room, package = path.split("/")[0], path.rsplit("/", 1)[0].replace("/", ".")
    found = []
    for module in sorted(imported_modules(source, package)):
        if is_inside(module, (*ROOMS, "examples", "tests", "bench")):
            allowed = is_inside(module, MAY_IMPORT[room])
        elif is_inside(module, ("deepspeed",)):
            allowed = path == "train/engine.py"
        elif is_inside(module, ("vllm",)):
            allowed = path in MAY_IMPORT_VLLM
        elif is_inside(module, ("transformers",)) and room in ("vlm", "train"):
            allowed = path.startswith(MAY_IMPORT_TRANSFORMERS)
        else:
            allowed = True
        if not allowed:
            found.append(module)
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_only_what_they_may(room):
    found = {
        name_of(path): forbidden_imports(path.read_text(), name_of(path))
        for path in python_files(room)
    }
    assert found, f"{room}/ holds no Python file"
    assert not {path: modules for path, modules in found.items() if modules}


@pytest.mark.parametrize(
    ("source", "path", "forbidden"),
    [
        ("import train.optim", "vlm/model.py", ["train.optim"]),
        ("def f():\n    from serve import chat", "vlm/graft/build.py", ["serve.chat"]),
        ("from ... import train", "vlm/data/formats/openai.py", []),
        ("from ..model import f", "vlm/data/chat.py", []),
        ("import serve.chat", "train/sft.py", ["serve.chat"]),
        ("from deepspeed import comm", "train/state.py", ["deepspeed.comm"]),
        ("import deepspeed", "train/engine.py", []),
        ("import transformers", "vlm/vision.py", ["transformers"]),
        ("from transformers import Qwen3Config", "vlm/graft/proof_witness.py", []),
        ("from vllm import LLM", "serve/chat.py", ["vllm.LLM"]),
        ("from vllm import LLM", "serve/vllm_view.py", []),
        ("from vlm.data.formats import messages", "eval/run.py", []),
        ("from vlm.data import chat", "eval/run.py", ["vlm.data.chat"]),
        ("from vlm.model import f", "eval/run.py", ["vlm.model.f"]),
    ],
)
def test_the_check_itself_sees_a_forbidden_import(source, path, forbidden):
    assert forbidden_imports(source, path) == forbidden


@pytest.mark.parametrize("folder", ["train", "serve", "eval", "examples/digits"])
def test_scripts_hide_no_standard_module(folder):
    """Running folder/script.py puts the folder first on sys.path."""
    names = {path.stem for path in (ROOT / folder).glob("*.py")} - {"__init__"}
    assert not names & sys.stdlib_module_names
