"""What a run says of itself: its first words, `log.jsonl` always, a line or a bar on the way.

log.jsonl       one object a line: {"event": ..., "step": ..., ...}
  start         command, versions, ranks, device, what trains, the budgets of a micro-batch: at each
                start and resume that has steps to take
  train         figures of the steps since the line before (train/window.py)
  eval          figures on the held-out data
  skipped, refused, saved
"""

import json
from pathlib import Path

from tqdm import tqdm

from train.config import TrainConfig
from train.data import TrainData
from train.disk import write_lines
from train.provenance import device_name, provenance
from train.trackers import open_trackers
from train.world import World
from vlm.cost import CONVENTION, PARTS, part_of
from vlm.cost.hardware import peak_tflops
from vlm.data.limits import ENVIRONMENT, environment_limits
from vlm.data.loader import StepDataset
from vlm.data.stream import StreamDataset
from vlm.model import VisionLanguageModel

TRACKED = ("train", "eval")
"""Events whose figures trackers get."""


def introduction(config: TrainConfig, world: World, data: TrainData) -> str:
    """What is started or resumed, on what data (good and bad samples), with which limits, and
    what its speed is measured by."""
    progress, total_steps = data.progress, data.total_steps
    defaults = environment_limits().items()
    in_force = [option for option, value in defaults if getattr(config, option) == value]
    set_by = {v: o for v, o in ENVIRONMENT.items() if o in in_force}
    step, ignored = progress.step, "options given now are not applied"
    place = f"{'resuming' if step else 'starting'} at step {step} of {total_steps}"
    if step == total_steps:
        place = f"finished at step {step} of {total_steps}, nothing is left to train: {ignored}"
    if step > total_steps:
        asked = f"max_steps {total_steps}" if config.max_steps else f"the {total_steps} asked for"
        place = f"the run is at step {step}, beyond {asked}: {ignored}"
    samples = "streamed samples" if config.streaming else f"{data.good} samples ({data.bad} bad)"
    return (
        f"{place}; "
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


def start_facts(model: VisionLanguageModel, dataset: StepDataset | StreamDataset) -> dict:
    """For the `start` event: of each part the parameters that train and all of them, and what a
    micro-batch may hold, which `auto_budget` has derived where it is on."""
    trains = {part: [0, 0] for part in PARTS}
    for name, parameter in model.named_parameters():
        counts = trains[part_of(name)]
        counts[0] += parameter.numel() * parameter.requires_grad
        counts[1] += parameter.numel()
    budget = dataset.plan.budget if isinstance(dataset, StepDataset) else dataset.budget
    names = ("samples",) if budget.mode == "samples" else ("tokens", "patches")
    return {"trains": trains, "budget": {name: getattr(budget, name) for name in names}}


class Log:
    """`log.jsonl`, the trackers and the terminal; only the first rank's says anything."""

    def __init__(
        self,
        config: TrainConfig,
        world: World,
        resumed_step: int,
        total_steps: int,
        facts: dict | None = None,
    ) -> None:
        """
        Args: facts: more for the `start` event (`start_facts`).
        """
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
        if resumed_step < total_steps:
            about = provenance(world) | (facts or {})
            self.write("start", resumed_step, total_steps=total_steps, **about)

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


def _words(figures: dict) -> str:
    mean, mfu = "loss of no target", ""
    if "loss" in figures:
        mean = f"loss {figures['loss']:.4f}  accuracy {figures['token_accuracy']:.3f}"
    if figures["mfu"]:
        mfu = f"  MFU {figures['mfu']:.1%}"
    speed = f"{figures['tokens_per_second']:,.0f} tokens/s"
    return f"{mean}  norm {figures['grad_norm']:.2f}  {speed}{mfu}"


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
    write_lines(path, map(json.dumps, kept))
