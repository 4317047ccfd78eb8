"""Gradients that are let go at once: what a measurement or a trial of a micro-batch wants."""

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


def drop_gradients(model: nn.Module) -> list[RemovableHandle]:
    """Let each gradient of what trains go as soon as it exists, as a rank's share of it does under
    ZeRO. Returns the hooks, for those who want gradients again."""
    trained = (parameter for parameter in model.parameters() if parameter.requires_grad)
    return [parameter.register_post_accumulate_grad_hook(_drop) for parameter in trained]


def _drop(parameter: Tensor) -> None:
    parameter.grad = None
