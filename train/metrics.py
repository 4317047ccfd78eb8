"""What a run says of itself: its first words, `log.jsonl` always, and a progress bar."""

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from train.config import TrainConfig
from train.state import Progress
from train.world import World
from vlm.data.limits import ENVIRONMENT, environment_limits


def introduction(
    config: TrainConfig, world: World, progress: Progress, good: int, bad: int, total_steps: int
) -> str:
    """What is started or resumed, on what data (good and bad samples), with which limits."""
    defaults = environment_limits().items()
    in_force = [option for option, value in defaults if getattr(config, option) == value]
    set_by = {v: o for v, o in ENVIRONMENT.items() if o in in_force}
    verb = "resuming" if progress.step else "starting"
    if progress.step >= total_steps:
        verb = "finished, nothing is left to train:"
    samples = "streamed samples" if config.streaming else f"{good} samples ({bad} bad)"
    return (
        f"{verb} at step {progress.step} of {total_steps}: "
        f"{samples}, {progress.global_batch_size} a step, {world.size} ranks on "
        f"{world.device.type}, {config.dtype}, max_pixels {config.max_pixels}, video_max_pixels "
        f"{config.video_max_pixels}, fps {config.fps}, fps_max_frames {config.fps_max_frames}"
        + "".join(f" ({option} from {variable})" for variable, option in set_by.items())
    )


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
        self._file.write(json.dumps(line) + "\n")
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

    def __init__(self, sources: Sequence[str]) -> None:
        self.sources = sources
        self.began = time.perf_counter()
        self.loss = self.steps = self.tokens = self.targets = self.samples = 0
        self.flops = self.data_seconds = self.norm = 0.0
        self.sums, self.seen = [0.0] * len(sources), [0.0] * len(sources)

    def add(
        self,
        loss: float,
        norm: float,
        counts: Sequence[float],
        sums: Sequence[float],
        seen: Sequence[float],
        data_seconds: float,
    ) -> None:
        """One step, over all ranks.

        Args:
            loss: the mean; norm: of the gradient.
            counts: targets, tokens, samples and FLOPs.
            sums: of losses, and `seen` the targets that they are of, per source.
        """
        targets, tokens, samples, flops = counts
        self.steps += 1
        self.loss += loss
        self.norm = norm
        self.sums = [a + b for a, b in zip(self.sums, sums, strict=True)]
        self.seen = [a + b for a, b in zip(self.seen, seen, strict=True)]
        self.targets += targets
        self.tokens += tokens
        self.samples += samples
        self.flops += flops
        self.data_seconds += data_seconds

    def figures(self) -> dict[str, object]:
        """Means and rates. FLOPs are useful ones, by the convention of `vlm/cost/`."""
        seconds = time.perf_counter() - self.began
        return {
            "loss": self.loss / self.steps,
            "loss_by_source": {
                name: total / seen
                for name, total, seen in zip(self.sources, self.sums, self.seen, strict=True)
                if seen
            },
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
