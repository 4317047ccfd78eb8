"""Backward and update, on one process or on many. The only file that imports DeepSpeed.

Both engines keep float32 masters of what trains, add up micro-batches in float32, clip by the
global norm, refuse a step whose norm is not finite, and give the same numbers.
"""

import math
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from train.config import TrainConfig, UsageError
from train.deepspeed_config import STAGES, deepspeed_config
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


class Stepped(NamedTuple):
    """What all ranks know of a step."""

    sums: list[float]
    """Of losses, over all ranks."""
    norm: float
    """Of the whole gradient, before clipping."""
    group_norms: dict[str, float]
    """The same by group, where it was asked for."""


class Engine(Protocol):
    param_groups: list[dict]
    """The optimiser's groups; `lr` is set through them."""
    updates: int
    """Optimiser steps taken; a refused one does not count."""
    group_of: dict[str, str]
    """Name of each parameter's group."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of this rank's share of the global mean loss."""

    def step(self, sums: Tensor, detail: bool = False) -> Stepped:
        """Update, unless a sum or the gradient's norm is not finite.

        What it returns is all that our code reads from the device in a step.

        Args:
            sums: (s,) float64: this rank's sums of losses.
            detail: also the norm of each group's gradient.
        """

    def fragments(self) -> Iterator[Fragment]:
        """This rank's training state."""

    def restored(self, updates: int) -> None:
        """The fragments have been written to: `updates` steps were taken before."""


def start_engine(
    model: nn.Module, groups: list[Group], config: TrainConfig, world: World
) -> Engine:
    """DeepSpeed where torchrun started us, else a plain engine."""
    world.limit_waits()  # what may take hours, indexing, is over
    if config.deepspeed and world.launched:
        return ZeroEngine(model, groups, config, world)
    return PlainEngine(groups, config)


def check_engine(config: TrainConfig, world: World) -> None:
    """Raise UsageError where no engine can be started; before anything is loaded."""
    if config.deepspeed:
        settings = deepspeed_config(config, world.size)
        offload = settings["zero_optimization"].get("offload_optimizer", {})
        if offload.get("device") == "cpu" and not world.launched:
            raise UsageError(
                f"deepspeed: {config.deepspeed} needs torchrun; plain python does not offload"
            )
        if config.deepspeed not in STAGES and world.launched:
            world.from_first(lambda: _check_file(config, settings, world))
    elif world.size > 1:
        raise UsageError(f"{world.size} ranks need DeepSpeed; set deepspeed: zero2")


def _check_file(config: TrainConfig, settings: dict, world: World) -> None:
    """UsageError where DeepSpeed does not take what a user's file has led to."""
    # whose product it checks against ranks that it does not know of yet
    settings = {key: value for key, value in settings.items() if key != "train_batch_size"}
    try:
        _import_deepspeed(config, world).DeepSpeedConfig(settings)
    except Exception as error:  # noqa: BLE001 - assertions, pydantic's and its own errors
        said = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in _details(error)]
        reason = "; ".join(said) or " ".join(str(error).split())
        raise UsageError(
            f"deepspeed: {config.deepspeed} is refused by DeepSpeed: {reason}"
        ) from None


def _details(error: Exception) -> list[dict]:
    """Of a validation error of pydantic: fields and what is wrong with them."""
    return error.errors() if hasattr(error, "errors") else []


class PlainEngine:
    """One process, no DeepSpeed."""

    def __init__(self, groups: list[Group], config: TrainConfig) -> None:
        self.updates = 0
        self._max_norm = config.max_grad_norm
        self.group_of = _group_of(groups)
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

    def step(self, sums: Tensor, detail: bool = False) -> Stepped:
        groups = self.param_groups if detail else []
        norms = [get_total_norm(_gradients(group["params"])) for group in groups]
        norms.append(nn.utils.clip_grad_norm_(self._masters.values(), self._max_norm))
        norms = torch.stack([norm.to(sums) for norm in norms])
        figures = torch.cat([sums, norms]).tolist()
        losses, (*norms, norm) = figures[: len(sums)], figures[len(sums) :]
        if all(map(math.isfinite, (*losses, norm))):
            self._optimizer.step()
            self.updates += 1
            self._publish()
        self._optimizer.zero_grad()
        names = (group["name"] for group in groups)
        return Stepped(losses, norm, dict(zip(names, norms, strict=True)))

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
    """DeepSpeed ZeRO-1 or ZeRO-2 (arXiv:1910.02054): masters and moments, and with ZeRO-2 the
    gradients, spread over ranks; on the host where they are offloaded."""

    def __init__(
        self, model: nn.Module, groups: list[Group], config: TrainConfig, world: World
    ) -> None:
        deepspeed = _import_deepspeed(config, world)
        backend = "gloo" if world.device.type == "cpu" else "nccl"
        deepspeed.init_distributed(dist_backend=backend, verbose=False)
        self.updates = 0
        self.group_of = _group_of(groups)
        self._world = world
        self._parameters = {n: p for group in groups for n, p in group.parameters.items()}
        self._engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=make_optimizer(groups, config),
            config=deepspeed_config(config, world.size),
        )
        world.limit_waits()  # of the groups that DeepSpeed has made
        self._zero = self._engine.optimizer
        self.param_groups = self._zero.param_groups
        self._masters = [group["params"][0] for group in self.param_groups]  # this rank's, flat
        # only when DeepSpeed comes to this call are gradients whole, with every stage
        self._update, self._zero.step = self._zero.step, self._checked_update
        self._sums = self._figures = None

    def backward(self, loss: Tensor) -> None:
        # DeepSpeed averages over ranks; the loss is already a share of the global mean
        self._engine.backward(loss * self._world.size, scale_wrt_gas=False)

    def step(self, sums: Tensor, detail: bool = False) -> Stepped:
        self._sums = sums
        self._engine.step()
        losses, squares = self._figures[: len(sums)], self._figures[len(sums) :]
        norm = math.inf  # where the step was refused, here or without a word by DeepSpeed
        if self._engine.was_step_applied():
            self.updates += 1
            norm = math.sqrt(sum(squares))
        names = (group["name"] for group in self.param_groups)
        norms = dict(zip(names, map(math.sqrt, squares), strict=True))
        return Stepped(losses, norm, norms if detail else {})

    def _checked_update(self) -> None:
        """Sum over ranks the losses and the squares of this rank's gradients, then update."""
        gradients = self._gradients()
        norms = [get_total_norm(group).to(self._sums) for group in gradients]
        squares = torch.stack(norms).square()
        self._figures = self._world.sum(torch.cat([self._sums, squares]).tolist())
        if not all(map(math.isfinite, self._figures)):
            # DeepSpeed refuses the step, and cleans up, where it finds a gradient of nan
            for gradient in chain.from_iterable(gradients):
                gradient.fill_(math.nan)
            # it has their norms already, where masters are offloaded
            norms = getattr(self._zero, "norm_for_param_grads", {})
            norms.update(dict.fromkeys(norms, torch.tensor(math.nan)))
        self._update()

    def _gradients(self) -> list[Sequence[Tensor]]:
        """By group, what this rank will update; DeepSpeed has three places for it."""
        zero = self._zero
        if hasattr(zero, "fp32_groups_gradient_flat_partition"):  # ZeRO-1 of bfloat16 weights
            flats = zero.fp32_groups_gradient_flat_partition
        elif zero.cpu_offload:
            flats = [master.grad for master in self._masters]
        else:
            return [zero.averaged_gradients[group] for group in range(len(self._masters))]
        # in pieces: a sum of float32 over a long tensor loses digits on a CPU
        return [flat.split(1 << 16) for flat in flats]

    def fragments(self) -> Iterator[Fragment]:
        optimizer = self._zero.optimizer
        for name, parameter in self._parameters.items():
            mapping = parameter._hp_mapping
            if mapping is None:  # nothing of it lies on this rank
                continue
            place, begin = mapping.lp_fragment_address, mapping.hp_fragment_address.start
            flat = self._masters[mapping.param_group_index]
            state = _moments(optimizer, flat, self.updates)
            yield Fragment(name, "master", place.start, flat.data.narrow(0, begin, place.numel))
            for kind in MOMENTS:
                values = state[kind].narrow(0, begin, place.numel)
                yield Fragment(name, kind, place.start, values)

    def restored(self, updates: int) -> None:
        self.updates = updates
        for flat in self._masters:
            _moments(self._zero.optimizer, flat, updates)["step"].fill_(updates)
        self._zero.update_lp_params()


def _import_deepspeed(config: TrainConfig, world: World):
    on_cpu = world.device.type == "cpu"
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        if not config.compile:
            os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # its import costs seconds
    import deepspeed

    deepspeed.logger.setLevel("WARNING")
    warnings.filterwarnings("ignore", ".*all_gather_into_tensor", FutureWarning)  # its own
    if on_cpu:  # else two minutes go into compiling a collective that gloo does as well
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
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


def _group_of(groups: list[Group]) -> dict[str, str]:
    return {name: group.name for group in groups for name in group.parameters}


def _gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    return [p.grad for p in parameters if p.grad is not None]
