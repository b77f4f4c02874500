"""transformers' experts interface: modules that hold all experts of a layer, and the shape of one expert."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import cast

from torch import Tensor, nn

Shape = tuple[int, int]
#: a module's parameters that hold all of its experts -> the matrices of each, below each other
FUSED = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}
#: the attributes of gated experts as `expert_forward` runs them
PLAIN = {"has_gate": True, "is_concatenated": True, "has_bias": False, "is_transposed": False}


@dataclass(frozen=True)
class ExpertsShape:
    """The experts of one module.

    Attributes:
        n_experts: Number of experts.
        matrices: (N, K) of each matrix of one expert: gate, up, down if it is gated.
        vectors: Number of one expert's other parameters (biases).
    """

    n_experts: int
    matrices: tuple[Shape, ...]
    vectors: int = 0


def find_experts(model: nn.Module) -> list[str]:
    """Return the names of the modules that hold all experts of a layer.

    These are the modules on transformers' interface; a layer may have stacked shared experts too (inkling).
    In a model without any, modules of stacked matrices `[E, N, K]`, which can be planned but not run.
    """
    on_interface: list[str] = []
    stacked: list[str] = []
    for name, module in model.named_modules():
        if hasattr(module, "is_concatenated") and hasattr(module, "_apply_gate"):
            on_interface.append(name)
        elif name.endswith("experts") and _is_stacked(module):
            stacked.append(name)
    return on_interface or stacked


def _is_stacked(module: nn.Module) -> bool:
    return any(of.dim() == 3 and of.shape[0] > 1 for of in module.parameters(recurse=False))


def has_plain_experts(module: nn.Module) -> bool:
    """Return whether these are gated experts without bias or norm, in transformers' usual layout."""
    as_usual = all(getattr(module, name, None) is value for name, value in PLAIN.items())
    return as_usual and not getattr(module, "has_post_expert_norm", False)


def experts_shape(module: nn.Module) -> ExpertsShape:
    """Read the sizes of a module of experts from its parameters, which may be on the meta device."""
    matrices: list[Shape] = []
    vectors = n_experts = 0
    for name, parameter in module.named_parameters(recurse=False):
        n_experts, *dims = parameter.shape
        if len(dims) != 2:
            vectors += prod(dims)
            continue
        is_pair = "gate_up" in name
        probably = is_pair and dims[1] >= 2 * dims[0]
        if getattr(module, "is_transposed", probably):
            dims.reverse()
        matrices += [(dims[0] // 2, dims[1])] * 2 if is_pair else [(dims[0], dims[1])]
    return ExpertsShape(n_experts, tuple(matrices), vectors)


def activation(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return the family's own activation of gate and up: `[T, 2 * intermediate]` -> `[T, intermediate]`.

    It belongs to a copy of the module, so that keeping it does not keep the model.
    """
    return cast(Callable[[Tensor], Tensor], copy.copy(module)._apply_gate)  # set by transformers' decorator
