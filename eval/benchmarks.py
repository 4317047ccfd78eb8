"""Benchmarks as data: one YAML each in `configs/eval/`, and suites that name several."""

import re
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from eval.result import EvalError

CONFIGS = Path(__file__).parents[1] / "configs" / "eval"
SUITE = "suite_"
Backend = Literal["native", "vlmevalkit"]

CHOICE, OPEN = ("question", "choices", "letters"), ("question",)
PROMPT_FIELDS = {
    "ai2d": CHOICE,
    "general_vmcq": CHOICE,
    "hallusion_bench": OPEN,
    "mm_bench": CHOICE,
    "mvbench": CHOICE,
    "ocr_bench": OPEN,
    "pope": OPEN,
    "science_qa": CHOICE,
    "seed_bench_2_plus": CHOICE,
    "videomme_v2": CHOICE,
    "vqav2": OPEN,
}
"""Adapters of EvalScope 1.14.1 that honour a prompt template, and what it may hold. The others
build their prompt from a constant and silently ignore one; VLMEvalKit takes none at all."""


@dataclass(frozen=True)
class Benchmark:
    """One benchmark. The default protocol: native backend, temperature 0, thinking off."""

    name: str
    """That of the file."""
    title: str
    source: str
    """Paper or page that defines it."""
    licence: str
    """Of the data, as its page states it."""
    size: int | None
    """Samples that are scored; null where that depends on your data."""
    metric: str
    """As papers call it: accuracy, ANLS, relaxed accuracy, ..."""
    native: str | None = None
    """Name of EvalScope's own adapter."""
    vlmevalkit: str | None = None
    """Name of VLMEvalKit's dataset."""
    hub_id: str | None = None
    """Where the native adapter's data comes from: a dataset of ModelScope."""
    native_metric: str | None = None
    """The library's metric that is meant; None for its primary one."""
    scale: float = 100.0
    """What the default backend's figure is multiplied by for a score of 0..100."""
    subsets: list[str] | None = None
    """Those that are scored; None for all."""
    prompt: str | None = None
    """Template in place of the adapter's own; only where the adapter honours one."""
    temperature: float = 0.0
    max_tokens: int = 512
    thinking: bool | None = None
    """Switches Qwen3's thinking by the template. None leaves it as the template has it, which in
    our exports is off: the prompt of training. `false` puts an empty thought there, which a model
    that was trained to think needs and ours has never seen."""
    judge: Literal["none", "optional", "required"] = "none"
    """A model that scores the answers. Optional: rules do it where no judge is named."""
    dataset_args: dict = field(default_factory=dict)
    """Further arguments of the native adapter."""
    differs: str | None = None
    """In what it differs from the default protocol or from the paper's, and why; stands beside
    every score as a note."""

    @property
    def backends(self) -> tuple[Backend, ...]:
        """Those that have it, the default first."""
        have = {"native": self.native, "vlmevalkit": self.vlmevalkit}
        return tuple(name for name in ("native", "vlmevalkit") if have[name])

    def protocol(self) -> dict:
        """What must be equal for two scores, whichever backend gave them."""
        shared = ("metric", "scale", "temperature", "max_tokens", "thinking")
        return {name: getattr(self, name) for name in shared}

    def __post_init__(self) -> None:
        """EvalError names what a backend would ignore or could not use."""
        if not self.backends:
            raise EvalError(f"{self.name}: neither native nor vlmevalkit is named")
        if self.max_tokens < 1 or self.temperature < 0 or self.scale <= 0 or (self.size or 1) < 1:
            raise EvalError(
                f"{self.name}: max_tokens, size and scale are positive, temperature is not negative"
            )
        if self.prompt is not None:
            self._check_prompt(self.prompt)
        ignored = ("hub_id", "native_metric", "subsets", "dataset_args")
        if not self.native and (given := [key for key in ignored if getattr(self, key)]):
            raise EvalError(f"{self.name}: VLMEvalKit ignores {', '.join(given)}; take it out")
        for key, ours in (("prompt_template", "prompt"), ("subset_list", "subsets")):
            if key in self.dataset_args:
                raise EvalError(f"{self.name}: write {ours} in place of dataset_args.{key}")
        default = bool(self.native) and self.temperature == 0 and not self.thinking
        if not default and not self.differs:
            raise EvalError(
                f"{self.name}: say in `differs` how and why it departs from the default protocol "
                "(native, temperature 0, thinking off)"
            )

    def _check_prompt(self, prompt: str) -> None:
        if self.vlmevalkit:
            raise EvalError(
                f"{self.name}: VLMEvalKit ignores a prompt; take out `prompt` or `vlmevalkit`"
            )
        known = PROMPT_FIELDS.get(self.native or "")
        if known is None:
            raise EvalError(
                f"{self.name}: the adapter {self.native} ignores a prompt; take `prompt` out "
                f"(those that honour one: {', '.join(sorted(PROMPT_FIELDS))})"
            )
        marks = {key: f"\0{key}\0" for key in known}
        try:
            filled = prompt.format(**marks)
        except (KeyError, IndexError, ValueError):
            raise EvalError(
                f"{self.name}: `prompt` may hold {_braced(known)} and no other braces but doubled"
            ) from None
        needed = [key for key in known if key != "letters"]
        if any(marks[key] not in filled for key in needed):
            raise EvalError(f"{self.name}: `prompt` must hold {_braced(needed)}")


def _braced(keys) -> str:
    return ", ".join(f"{{{key}}}" for key in keys)


def load(name: str) -> Benchmark:
    """A benchmark by its name, or by the path of a YAML; EvalError says what is wrong with it."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else CONFIGS / f"{name}.yaml"
    if not path.is_file():
        close = get_close_matches(path.stem, names())
        hint = f"; did you mean {close[0]}?" if close else f"; there are {', '.join(names())}"
        raise EvalError(f"there is no benchmark {name}{hint}")
    content = _read(path)
    known = [entry.name for entry in fields(Benchmark)]
    for key in content:
        if key not in known:
            close = get_close_matches(str(key), known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"
            raise EvalError(f"{path}: unknown key {key}; {hint}")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Benchmark)
    try:
        options = parser.parse_object(content).as_dict()
    except ArgumentError as error:
        raise EvalError(f"{path}: {_explain(error, content)}") from None
    benchmark = Benchmark(**options)
    if benchmark.name != path.stem:
        raise EvalError(f"{path} calls itself {benchmark.name}; name and file must agree")
    return benchmark


def _explain(error: ArgumentError, content: dict) -> str:
    """jsonargparse's message in one line, and in our words where a value has the wrong type."""
    message = " ".join(str(error).split())
    wrong = re.match(r'Parser key "(\w+)"', message)
    if wrong is None:
        return message
    kind = Benchmark.__annotations__[wrong[1]]
    kind = kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")
    return f"{wrong[1]} is {content[wrong[1]]!r}; it must be {kind}"


def names() -> list[str]:
    """All benchmarks that ship."""
    return sorted(p.stem for p in CONFIGS.glob("*.yaml") if not p.stem.startswith(SUITE))


def load_suite(path: str | Path) -> list[str]:
    """The benchmarks that a suite names: `benchmarks: [mmmu, ...]`, each checked by `load`."""
    path = Path(path)
    if not path.is_file():
        raise EvalError(f"there is no suite {path}")
    content = _read(path)
    listed = content.get("benchmarks")
    if set(content) != {"benchmarks"} or not isinstance(listed, list) or not listed:
        raise EvalError(f"{path}: a suite holds `benchmarks: [NAME, ...]` and nothing else")
    listed = [str(name) for name in listed]
    for name in listed:
        if listed.count(name) > 1:
            raise EvalError(f"{path} names {name} twice")
        load(name)
    return listed


def _read(path: Path) -> dict:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise EvalError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise EvalError(f"{path} holds no `key: value` lines")
    return content
