"""Backward and update, on one process or on many. The only file that knows DeepSpeed.

Both engines keep float32 masters of what trains, add up micro-batches in float32, clip by the
global norm, refuse a step whose norm is not finite, and give the same numbers.
"""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from train.config import TrainConfig, UsageError
from train.freeze import Group
from train.optim import make_optimizer
from train.world import World

MOMENTS = ("exp_avg", "exp_avg_sq")


class Fragment(NamedTuple):
    """A piece of the training state of one parameter, owned by this rank."""

    parameter: str
    kind: str
    """`master`, `exp_avg` or `exp_avg_sq`."""
    start: int
    """Where it begins in the flattened parameter."""
    values: Tensor
    """(n,) float32: a view; writing to it changes the state."""


class Engine(Protocol):
    param_groups: list[dict]
    """The optimiser's groups; `lr` is set through them."""
    updates: int
    """Optimiser steps taken; a refused one does not count."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of this rank's share of the global mean loss."""

    def step(self, sums: Tensor) -> tuple[list[float], float]:
        """Update, unless a sum or the gradient's norm is not finite.

        Args:
            sums: (s,) float64: this rank's sums of losses.

        Returns:
            The sums over all ranks, and the norm: all that is read from the device in a step.
        """

    def fragments(self) -> Iterator[Fragment]:
        """This rank's training state."""

    def restored(self, updates: int) -> None:
        """The fragments have been written to: `updates` steps were taken before."""


def start_engine(
    model: nn.Module, groups: list[Group], config: TrainConfig, world: World
) -> Engine:
    """DeepSpeed where torchrun started us, else a plain engine."""
    if config.deepspeed and world.launched:
        return ZeroEngine(model, groups, config, world)
    return PlainEngine(groups, config)


def check_engine(config: TrainConfig, world: World) -> None:
    """Raise UsageError where no engine can be started; costs nothing."""
    if config.deepspeed:
        deepspeed_config(config, world.size)
    elif world.size > 1:
        raise UsageError(f"{world.size} ranks need DeepSpeed; set deepspeed: zero2")


class PlainEngine:
    """One process, no DeepSpeed."""

    def __init__(self, groups: list[Group], config: TrainConfig) -> None:
        self.updates = 0
        self._max_norm = config.max_grad_norm
        self._parameters = {n: p for group in groups for n, p in group.parameters.items()}
        self._masters = {name: _master(p) for name, p in self._parameters.items()}
        for name, parameter in self._parameters.items():
            if self._masters[name] is not parameter:
                parameter.register_post_accumulate_grad_hook(self._collector(name))
        owned = [
            Group(
                g.name, g.learning_rate, g.weight_decay, {n: self._masters[n] for n in g.parameters}
            )
            for g in groups
        ]
        self._optimizer = make_optimizer(owned, config)
        self.param_groups = self._optimizer.param_groups

    def _collector(self, name: str):
        """Adds a bfloat16 gradient to its float32 master's as soon as it exists."""

        def collect(parameter: nn.Parameter) -> None:
            master = self._masters[name]
            gradient = parameter.grad.float()
            master.grad = gradient if master.grad is None else master.grad.add_(gradient)
            parameter.grad = None

        return collect

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, sums: Tensor) -> tuple[list[float], float]:
        norm = nn.utils.clip_grad_norm_(self._masters.values(), self._max_norm)
        *losses, norm = torch.cat([sums, norm.double()[None]]).tolist()
        if all(map(math.isfinite, (*losses, norm))):
            self._optimizer.step()
            self.updates += 1
            self._publish()
        self._optimizer.zero_grad()
        return losses, norm

    def fragments(self) -> Iterator[Fragment]:
        for name, master in self._masters.items():
            state = _moments(self._optimizer, master, self.updates)
            yield Fragment(name, "master", 0, master.data.view(-1))
            for kind in MOMENTS:
                yield Fragment(name, kind, 0, state[kind].view(-1))

    def restored(self, updates: int) -> None:
        self.updates = updates
        for master in self._masters.values():
            self._optimizer.state[master]["step"].fill_(updates)
        self._publish()

    @torch.no_grad()
    def _publish(self) -> None:
        """Masters to the model's weights, where they differ."""
        for name, parameter in self._parameters.items():
            if self._masters[name] is not parameter:
                parameter.copy_(self._masters[name])


class ZeroEngine:
    """DeepSpeed ZeRO-2 (arXiv:1910.02054): gradients, masters and moments spread over ranks."""

    def __init__(
        self, model: nn.Module, groups: list[Group], config: TrainConfig, world: World
    ) -> None:
        deepspeed = _import_deepspeed(world)
        self.updates = 0
        self._world = world
        self._parameters = {n: p for group in groups for n, p in group.parameters.items()}
        self._engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=make_optimizer(groups, config),
            config=deepspeed_config(config, world.size),
        )
        self._zero = self._engine.optimizer
        self.param_groups = self._zero.param_groups

    def backward(self, loss: Tensor) -> None:
        # DeepSpeed averages over ranks; the loss is already a share of the global mean
        self._engine.backward(loss * self._world.size, scale_wrt_gas=False)

    def step(self, sums: Tensor) -> tuple[list[float], float]:
        losses = self._world.sum(sums.tolist())
        if not all(map(math.isfinite, losses)):
            self._poison()
        self._engine.step()
        norm = float(self._engine.get_global_grad_norm())
        if math.isfinite(norm):  # else DeepSpeed has skipped the step, without a word
            self.updates += 1
        return losses, norm

    def _poison(self) -> None:
        """Make DeepSpeed refuse the step: it does so, and cleans up, where a gradient is nan."""
        for gradients in (self._zero.all_grad_tensors, self._zero.averaged_gradients):
            for group in gradients.values():
                for gradient in group or ():
                    gradient.fill_(math.nan)

    def fragments(self) -> Iterator[Fragment]:
        optimizer = self._zero.optimizer
        for name, parameter in self._parameters.items():
            mapping = parameter._hp_mapping
            if mapping is None:  # nothing of it lies on this rank
                continue
            place, begin = mapping.lp_fragment_address, mapping.hp_fragment_address.start
            flat = self._zero.single_partition_of_fp32_groups[mapping.param_group_index]
            state = _moments(optimizer, flat, self.updates)
            yield Fragment(name, "master", place.start, flat.data.narrow(0, begin, place.numel))
            for kind in MOMENTS:
                values = state[kind].narrow(0, begin, place.numel)
                yield Fragment(name, kind, place.start, values)

    def restored(self, updates: int) -> None:
        self.updates = updates
        for flat in self._zero.single_partition_of_fp32_groups:
            _moments(self._zero.optimizer, flat, updates)["step"].fill_(updates)
        self._zero.update_lp_params()


def deepspeed_config(config: TrainConfig, world_size: int) -> dict:
    """DeepSpeed's own settings: what a step is and how it is added up is the loop's business,
    all else is taken from the user's JSON file."""
    bfloat16 = config.dtype == "bfloat16"
    settings = {
        "train_micro_batch_size_per_gpu": config.per_device_train_batch_size,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,  # the loop decides where a step ends
        "train_batch_size": config.per_device_train_batch_size * world_size,
        "gradient_clipping": config.max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "steps_per_print": 1_000_000_000,
    }
    if bfloat16:
        settings["bf16"] = {"enabled": True, "check_grad_overflow": True}
    zero = {"stage": 2, "overlap_comm": False}
    if config.deepspeed != "zero2":
        settings = _user_settings(Path(config.deepspeed)) | settings
        zero |= settings.get("zero_optimization", {})
    return settings | {"zero_optimization": zero}


def _user_settings(path: Path) -> dict:
    try:
        settings = _without_auto(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"deepspeed: {path} is neither 'zero2' nor a JSON file ({error})"
        ) from None
    stage = settings.get("zero_optimization", {}).get("stage", 2)
    if stage != 2:
        raise UsageError(f"{path} asks for ZeRO stage {stage}; only stage 2 is supported")
    return settings


def _without_auto(settings: dict) -> dict:
    """Without the keys that transformers' Trainer would fill in."""
    return {
        key: _without_auto(value) if isinstance(value, dict) else value
        for key, value in settings.items()
        if value != "auto"
    }


def _import_deepspeed(world: World):
    on_cpu = world.device.type == "cpu"
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # its import costs seconds
    import deepspeed

    deepspeed.logger.setLevel("WARNING")
    if on_cpu:  # else two minutes go into compiling a collective that gloo does as well
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo" if on_cpu else "nccl", verbose=False)
    return deepspeed


def _master(parameter: nn.Parameter) -> nn.Parameter:
    """The float32 copy that is trained; the parameter itself where it is float32."""
    if parameter.dtype == torch.float32:
        return parameter
    return nn.Parameter(parameter.detach().float())


def _moments(optimizer: torch.optim.Optimizer, owned: Tensor, updates: int) -> dict[str, Tensor]:
    """AdamW's state of a tensor, made here where no step has been taken yet."""
    state = optimizer.state[owned]
    if not state:
        state["step"] = torch.tensor(float(updates), device=owned.device)
        state |= {kind: torch.zeros_like(owned, requires_grad=False) for kind in MOMENTS}
        optimizer.state[owned] = state
    return state
