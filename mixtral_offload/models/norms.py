"""RMS norms by the kernels: one call in place of the six operations of transformers' modules.

Knows modules of transformers by what they compute. Knows nothing of experts.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from mixtral_offload.weights.native import Native

#: numbers of one pass; more are worth torch's threads
MOST_NUMBERS = 1 << 16
EPS_NAMES = ("variance_epsilon", "eps")


class ByKernels(nn.Module):
    """Comes before a norm's own class: that one still computes what the kernels do not.

    Attributes:
        own: The norm's own class.
        native: The kernels.
        eps_name: The attribute that holds what is added to the mean square.
        plus: What is added to the weight: 1 in some families, else 0.
    """

    own: type[nn.Module]
    native: Native
    eps_name: str
    plus: float

    def forward(self, *arguments: Any, **named: Any) -> Any:
        """Compute the norm, by its own class for other inputs than few fp32 rows without gradients."""
        x, weight = (
            arguments[0] if len(arguments) == 1 and not named else None,
            self._parameters.get("weight"),
        )
        if (
            weight is None
            or type(x) is not Tensor
            or not x.dtype == weight.dtype == torch.float32
            or not (x.is_cpu and weight.is_cpu and weight.is_contiguous())
            or x.shape[-1:] != weight.shape
            or x.numel() > MOST_NUMBERS
            or torch.is_grad_enabled()
            or torch.compiler.is_compiling()
        ):
            return self.own.forward(self, *arguments, **named)
        return self.native.rms_norm(x, weight, getattr(self, self.eps_name), self.plus)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles are of the norm's own class."""
        return object.__new__, (self.own,), self.__dict__


@functools.cache
def _class_of(own: type[nn.Module], native: Native, eps_name: str, plus: float) -> type[nn.Module]:
    """A class of the same name, which asks the kernels first."""
    values = {"own": own, "native": native, "eps_name": eps_name, "plus": plus, "__module__": own.__module__}
    return type(own.__name__, (ByKernels, own), values)


def replace_norms(model: nn.Module, native: Native) -> int:
    """Let the kernels compute a model's RMS norms, found by trying; return how many there are."""
    found = 0
    for norm in model.modules():
        eps_name = next((name for name in EPS_NAMES if isinstance(getattr(norm, name, None), float)), None)
        plus = None if eps_name is None else _plus_of(norm, native, eps_name)
        if eps_name is not None and plus is not None:
            norm.__class__ = _class_of(type(norm), native, eps_name, plus)  # type: ignore[arg-type]
            found += 1
    return found


@torch.inference_mode()
def _plus_of(norm: nn.Module, native: Native, eps_name: str) -> float | None:
    """What a norm adds to its weight; None if it is no RMS norm that the kernels can compute."""
    weight, is_named = norm._parameters.get("weight"), type(norm).__name__.endswith("RMSNorm")
    if not is_named or isinstance(norm, ByKernels) or len(norm._parameters) != 1 or norm._buffers:
        return None
    if weight is None or weight.ndim != 1 or not weight.numel():
        return None
    if weight.dtype != torch.float32 or not weight.is_cpu:
        return None
    n, like = weight.numel(), torch.empty(0, dtype=torch.float32, device="cpu")
    random = torch.Generator().manual_seed(0)
    sizes = like.new_tensor([3.0, 1e-3, 0.0])  # the smaller ones show what eps is
    x = sizes[:, None, None] * like.new_empty(3, 2, n).normal_(generator=random)
    other = like.new_empty(n).normal_(generator=random)  # its own weight may be all ones
    try:
        expected = torch.func.functional_call(norm, {"weight": other}, (x,))
    except Exception:  # other arguments: not one of these
        return None
    for plus in (0.0, 1.0):
        found = native.rms_norm(x, other, getattr(norm, eps_name), plus)
        if type(expected) is Tensor and torch.allclose(found, expected, rtol=1e-5, atol=1e-5):
            return plus
    return None
