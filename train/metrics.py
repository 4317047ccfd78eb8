"""What a run says of itself: `log.jsonl` always, and a progress bar."""

import json
import os
import time
from pathlib import Path

from tqdm import tqdm


class Log:
    """Lines of `log.jsonl`, written by the first rank alone."""

    def __init__(self, path: Path, resumed_step: int, total_steps: int, enabled: bool) -> None:
        self.enabled = enabled
        if not enabled:
            return
        _forget_after(path, resumed_step)
        self._file = path.open("a", encoding="utf-8")
        self._bar = tqdm(total=total_steps, initial=resumed_step, desc="train", disable=None)
        self._began = time.perf_counter()

    def write(self, event: str, step: int, **values) -> None:
        """One line: what happened at a step, with its figures."""
        if not self.enabled:
            return
        line = {"event": event, "step": step, **values}
        self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._file.flush()

    def show(self, step: int, text: str) -> None:
        """Move the bar."""
        if self.enabled:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(step - self._bar.n)

    def say(self, text: str) -> None:
        """A line for the person who watches."""
        if self.enabled:
            tqdm.write(text)

    def close(self) -> None:
        if self.enabled:
            self._file.close()
            self._bar.close()


class Window:
    """Sums over the steps between two log lines."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.loss = self.steps = self.tokens = self.targets = self.samples = 0
        self.flops = self.data_seconds = self.norm = 0.0

    def add(self, loss: float, norm: float, counts: list[float], data_seconds: float) -> None:
        """One step: mean loss, gradient norm and (targets, tokens, samples, FLOPs) of all ranks."""
        targets, tokens, samples, flops = counts
        self.steps += 1
        self.loss += loss
        self.norm = norm
        self.targets += targets
        self.tokens += tokens
        self.samples += samples
        self.flops += flops
        self.data_seconds += data_seconds

    def figures(self) -> dict[str, float]:
        """Means and rates. FLOPs are useful ones, by the convention of `vlm/cost.py`."""
        seconds = time.perf_counter() - self.began
        return {
            "loss": self.loss / self.steps,
            "grad_norm": self.norm,  # of the last step that was taken
            "tokens": int(self.tokens),
            "targets": self.targets,
            "samples": int(self.samples),
            "seconds": round(seconds, 4),
            "tokens_per_second": round(self.tokens / seconds, 1),
            "samples_per_second": round(self.samples / seconds, 2),
            "useful_tflops_per_second": round(self.flops / seconds / 1e12, 5),
            "data_wait": round(self.data_seconds / seconds, 4),
        }


def _forget_after(path: Path, step: int) -> None:
    """Drop lines of steps that a resumed run will take again, and a torn last line."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError):
            continue
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    os.replace(partial, path)
