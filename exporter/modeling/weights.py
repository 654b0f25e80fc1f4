"""Build modules without allocating their weights, and give them weights that are read one by one."""

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

AnyModule = TypeVar("AnyModule", bound=nn.Module)

# Module parameters by name, each read (and where needed converted) when it is called.
Weights = Mapping[str, Callable[[], Tensor]]


def load_module(build: Callable[[], AnyModule], weights: Weights) -> AnyModule:
    """The module that `build` makes, with its weights, ready for inference; nothing is held twice.

    Parameters that no weight is given for are not there.
    """
    with torch.device("meta"):
        module = build()
    for name, _ in list(module.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        value = nn.Parameter(weights[name](), requires_grad=False) if name in weights else None
        setattr(module.get_submodule(owner), leaf, value)
    return module.eval()


def parameter_shapes(build: Callable[[], nn.Module]) -> dict[str, tuple[int, ...]]:
    """Shape of each parameter, by name, of the module that `build` makes; nothing is allocated."""
    with torch.device("meta"):
        return {name: tuple(parameter.shape) for name, parameter in build().named_parameters()}
