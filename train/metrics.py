"""What a run says of itself: its first words, `log.jsonl` always, a line or a bar on the way.

log.jsonl       one object a line: {"event": ..., "step": ..., ...}
  start         command, versions, ranks, device: at each start and resume
  train         figures of the steps since the line before (`Window`)
  eval          figures on the held-out data
  skipped, refused, saved
"""

import json
import os
import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from train.config import TrainConfig
from train.data import TrainData
from train.engine import Engine, Stepped
from train.provenance import device_name, provenance
from train.trackers import open_trackers
from train.update_ratio import update_ratios
from train.world import World
from vlm.cost import CONVENTION
from vlm.cost.hardware import peak_tflops
from vlm.data.limits import ENVIRONMENT, environment_limits

TRACKED = ("train", "eval")
"""Events whose figures trackers get."""


def introduction(config: TrainConfig, world: World, data: TrainData) -> str:
    """What is started or resumed, on what data (good and bad samples), with which limits, and
    what its speed is measured by."""
    progress, total_steps = data.progress, data.total_steps
    defaults = environment_limits().items()
    in_force = [option for option, value in defaults if getattr(config, option) == value]
    set_by = {v: o for v, o in ENVIRONMENT.items() if o in in_force}
    verb = "resuming" if progress.step else "starting"
    if progress.step >= total_steps:
        verb = "finished, nothing is left to train:"
    samples = "streamed samples" if config.streaming else f"{data.good} samples ({data.bad} bad)"
    return (
        f"{verb} at step {progress.step} of {total_steps}: "
        f"{samples}, {progress.global_batch_size} a step, {world.size} ranks on "
        f"{world.device.type}, {config.dtype}, max_pixels {config.max_pixels}, video_max_pixels "
        f"{config.video_max_pixels}, fps {config.fps}, fps_max_frames {config.fps_max_frames}"
        + "".join(f" ({option} from {variable})" for variable, option in set_by.items())
        + f"\n{_convention(config, world)}"
    )


def _convention(config: TrainConfig, world: World) -> str:
    device, peak = device_name(world), peak_tflops(device_name(world), config.dtype)
    if peak is None:
        return f"{CONVENTION}; no MFU, since the peak of {device} in {config.dtype} is not known"
    return f"{CONVENTION}; MFU is their share of {peak:g} TFLOP/s ({device}, {config.dtype})"


class Log:
    """`log.jsonl`, the trackers and the terminal; only the first rank's says anything."""

    def __init__(
        self, config: TrainConfig, world: World, resumed_step: int, total_steps: int
    ) -> None:
        self.enabled = world.first
        self._resumed_step, self._total_steps = resumed_step, total_steps
        if not self.enabled:
            return
        path = config.output_dir / "log.jsonl"
        _forget_after(path, resumed_step)
        self._file = path.open("a", encoding="utf-8")
        self._bar = tqdm(total=total_steps, initial=resumed_step, desc="train", disable=None)
        self._trackers = open_trackers(config, resumed_step)
        peak = peak_tflops(device_name(world), config.dtype)
        self._peak_tflops = peak and peak * world.size
        self._seconds = 0.0
        self.write("start", resumed_step, total_steps=total_steps, **provenance(world))

    def write(self, event: str, step: int, **values) -> None:
        """One line: what happened at a step, with its figures."""
        if not self.enabled:
            return
        line = {"event": event, "step": step, **values}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        if event in TRACKED:
            for tracker in self._trackers:
                tracker.log(step, _flat(event, values))

    def train(self, step: int, epoch: int, figures: dict) -> None:
        """The figures of a `Window`, with what follows from the run: MFU and the time left."""
        if not self.enabled:
            return
        tflops, peak = figures["useful_tflops_per_second"], self._peak_tflops
        self._seconds += figures["seconds"]
        per_step = self._seconds / (step - self._resumed_step)
        figures = figures | {
            "mfu": round(tflops / peak, 4) if peak else None,
            "eta_seconds": round(per_step * (self._total_steps - step), 1),
        }
        self.write("train", step, epoch=epoch, **figures)
        words = _words(figures)
        self._bar.set_postfix_str(words, refresh=False)
        self._bar.update(step - self._bar.n)
        if self._bar.disable:  # no terminal
            left = f"{tqdm.format_interval(figures['eta_seconds'])} left"
            self.say(f"step {step}/{self._total_steps}  {words}  {left}")

    def eval(self, step: int, figures: dict) -> None:
        """Figures on the held-out data."""
        self.write("eval", step, **figures)
        shown = ", ".join(
            f"{name.replace('_', ' ')} {value:.4g}"
            for name, value in figures.items()
            if isinstance(value, int | float)
        )
        self.say(f"held out at step {step}: {shown}")

    def say(self, text: str) -> None:
        """A line for the person who watches."""
        if self.enabled:
            tqdm.write(text)

    def end(self, step: int, checkpoint: Path) -> None:
        """The last words of a run that is over, or goes on later."""
        if step < self._total_steps:
            more = f"the same command goes on to step {self._total_steps}"
            self.say(f"ended early at step {step}, saved as {checkpoint}; {more}")
        else:
            self.say(f"done: {checkpoint}")
        self.close()

    def close(self) -> None:
        if self.enabled:
            self._file.close()
            self._bar.close()
            for tracker in self._trackers:
                tracker.close()


class Window:
    """Sums over the steps between two log lines, and where their time went."""

    def __init__(self, sources: Sequence[str], world: World) -> None:
        self.sources, self.world = sources, world
        self.began = time.perf_counter()
        self.steps = self.tokens = self.targets = self.samples = 0
        self.loss = self.flops = self.right = 0.0
        self.sums, self.seen = [0.0] * len(sources), [0.0] * len(sources)
        self.waits = {"data": 0.0, "ranks": 0.0, "save": 0.0, "eval": 0.0}
        self._forwards: list[tuple] = []

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Measure what does not train: `data`, `ranks`, `save` or `eval`."""
        began = time.perf_counter()
        yield
        self.waits[what] += time.perf_counter() - began

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Measure a micro-batch's forward pass on the device, without waiting for it."""
        began = self._mark()
        yield
        self._forwards.append((began, self._mark()))

    def _mark(self) -> "float | torch.cuda.Event":
        if self.world.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def add(
        self, loss: float, stepped: Stepped, counts: Sequence[float], seen: Sequence[float]
    ) -> None:
        """One step, over all ranks.

        Args:
            loss: the mean.
            stepped: its sums are of losses per source, and last the number of right answers.
            counts: targets, tokens, samples and FLOPs.
            seen: targets that the losses are of, per source.
        """
        *sums, right = stepped.sums
        targets, tokens, samples, flops = counts
        self.steps += 1
        self.loss += loss
        self.right += right
        self.last = stepped
        self.sums = [a + b for a, b in zip(self.sums, sums, strict=True)]
        self.seen = [a + b for a, b in zip(self.seen, seen, strict=True)]
        self.targets += targets
        self.tokens += tokens
        self.samples += samples
        self.flops += flops

    def figures(self, engine: Engine) -> dict:
        """Means and rates over all ranks; every rank calls this.

        FLOPs are useful ones, by the convention of `vlm/cost/`. Waits are shares of the time, of
        which evaluation is no part. The slowest rank is waited for before a step and in the
        backward passes: by `imbalance`, as if these were as uneven as the forward passes.
        """
        seconds = time.perf_counter() - self.began - self.waits["eval"]
        own = [_memory(self.world.device), self.waits["data"], self.waits["ranks"]]
        ranks = np.array(self.world.gather([own + self._forward_seconds()]))  # (ranks, 3 + n)
        data, barrier = ranks[:, 1:3].mean(0).tolist()
        computing = seconds - data - barrier - self.waits["save"]
        detail = self.last.group_norms  # empty where the step to be logged was refused
        return {
            "loss": self.loss / self.steps,
            "loss_by_source": {
                name: total / seen
                for name, total, seen in zip(self.sources, self.sums, self.seen, strict=True)
                if seen
            },
            "token_accuracy": self.right / max(sum(self.seen), 1),
            "grad_norm": self.last.norm,  # of the last step that was taken, as what follows
            "grad_norm_by_group": detail,
            "update_ratio_by_group": update_ratios(engine, self.world) if detail else {},
            "lr": {group["name"]: group["lr"] for group in engine.param_groups},
            "tokens": int(self.tokens),
            "targets": self.targets,
            "samples": int(self.samples),
            "seconds": round(seconds, 4),
            "tokens_per_second": round(self.tokens / seconds, 1),
            "samples_per_second": round(self.samples / seconds, 2),
            "useful_tflops_per_second": round(self.flops / seconds / 1e12, 5),
            "data_wait": round(data / seconds, 4),
            "rank_wait": round((barrier + imbalance(ranks[:, 3:]) * computing) / seconds, 4),
            "save_wait": round(self.waits["save"] / seconds, 4),
            "memory_gb": round(float(ranks[:, 0].max()) / 1e9, 3),
        }

    def _forward_seconds(self) -> list[float]:
        if self.world.device.type != "cuda":
            return [end - began for began, end in self._forwards]
        self._forwards[-1][1].synchronize()
        return [began.elapsed_time(end) / 1000 for began, end in self._forwards]


def imbalance(seconds: np.ndarray) -> float:
    """Share of their time that ranks wait for the slowest, if all wait after each micro-batch.

    Args:
        seconds: (ranks, micro-batches), of the work between two waits.
    """
    return 1 - float(seconds.mean(0).sum() / seconds.max(0).sum())


def read_log(path: Path) -> list[dict]:
    """The lines of a log in their order; one torn by a crash is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
            lines.append({"event": line["event"], "step": line["step"], **line})
        except (ValueError, KeyError, TypeError):
            continue
    return lines


def _memory(device: torch.device) -> int:
    """Most bytes held so far: of the device, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _words(figures: dict) -> str:
    mfu = f"  MFU {figures['mfu']:.1%}" if figures["mfu"] else ""
    return (
        f"loss {figures['loss']:.4f}  accuracy {figures['token_accuracy']:.3f}  norm "
        f"{figures['grad_norm']:.2f}  {figures['tokens_per_second']:,.0f} tokens/s{mfu}"
    )


def _flat(prefix: str, values: dict) -> dict[str, float]:
    """{"train/loss": ..., "train/lr/vit/decay": ...}: the numbers among nested values."""
    flat = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(f"{prefix}/{name}", value)
        elif isinstance(value, int | float):
            flat[f"{prefix}/{name}"] = value
    return flat


def _forget_after(path: Path, step: int) -> None:
    """Drop lines of steps that a resumed run will take again, and a torn last line; starts are
    history and stay."""
    done = [line for line in read_log(path) if line["event"] == "start" or line["step"] <= step]
    kept = [line for line in done if line["event"] == "start" or step]  # none was taken before 0
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    os.replace(partial, path)
