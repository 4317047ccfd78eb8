"""What the steps between two log lines come to: means, rates, and where the time went."""

import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from train.engine import Engine, Stepped
from train.update_ratio import update_ratios
from train.world import World


class Window:
    """Sums over the steps between two log lines, and where their time went."""

    def __init__(self, sources: Sequence[str], world: World) -> None:
        self.sources, self.world = sources, world
        self.began = time.perf_counter()
        self.steps = self.tokens = self.targets = self.samples = 0
        self.flops = self.right = 0.0
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

    def add(self, stepped: Stepped, counts: Sequence[float], seen: Sequence[float]) -> None:
        """One step, over all ranks.

        Args:
            stepped: its sums are of losses per source, and last the number of right answers.
            counts: targets, tokens, samples and FLOPs.
            seen: targets that the losses are of, per source.
        """
        *sums, right = stepped.sums
        targets, tokens, samples, flops = counts
        self.steps += 1
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

        Losses and accuracy are means over the targets that were seen; without any, where all
        samples were texts that stage 1 leaves out, there are none.
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
        seen = sum(self.seen)
        means = {"loss": sum(self.sums) / seen, "token_accuracy": self.right / seen} if seen else {}
        return (
            means
            | {
                "loss_by_source": {
                    name: total / seen
                    for name, total, seen in zip(self.sources, self.sums, self.seen, strict=True)
                    if seen
                },
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
        )

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


def _memory(device: torch.device) -> int:
    """Most bytes held so far: of the device, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
