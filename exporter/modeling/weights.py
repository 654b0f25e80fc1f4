"""Build modules without allocating their weights, then set weights that are read one at a time."""

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

AnyModule = TypeVar("AnyModule", bound=nn.Module)

# A reader for each parameter of a module, by name; the value is read (and converted, where needed) when it is called.
Weights = Mapping[str, Callable[[], Tensor]]


def load_module(build: Callable[[], AnyModule], weights: Weights) -> AnyModule:
    """Build a module and set its weights, in inference mode; memory holds each weight once.

    Args:
        build: makes the module; it is called on the meta device.
        weights: a reader for each parameter, by name; a parameter without a reader becomes None.
    """
    with torch.device("meta"):
        module = build()
    for name, _ in list(module.named_parameters()):
        set_parameter(module, name, weights[name]() if name in weights else None)
    return module.eval()


def constant(value: Tensor) -> Callable[[], Tensor]:
    """Return a reader of a value that is in memory already."""
    return lambda: value


def set_parameter(module: nn.Module, name: str, value: Tensor | None) -> None:
    """Set one parameter of a module, which may be on the meta device, in inference mode; None takes its memory back."""
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, None if value is None else nn.Parameter(value, requires_grad=False))


def parameter_shapes(build: Callable[[], nn.Module]) -> dict[str, tuple[int, ...]]:
    """Return the shape of each parameter, by name, of the module that `build` makes; nothing is allocated."""
    with torch.device("meta"):
        return {name: tuple(parameter.shape) for name, parameter in build().named_parameters()}
