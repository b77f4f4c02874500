"""RMS norms by the kernels: one call in place of the six operations of transformers' modules.

Knows modules of transformers by what they compute. Knows nothing of experts.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn

from mixtral_offload.weights.native import Native

#: numbers of one pass; more are worth torch's threads
MOST_NUMBERS = 1 << 16


class _Forward:
    """Takes the place of a norm's `forward`: that one still computes what the kernels do not.

    Args:
        plus: What is added to the weight: 1 in some families, else 0.
    """

    def __init__(self, native: Native, norm: nn.Module, eps: float, plus: float):
        self._native, self._norm, self._eps, self._plus = native, weakref.ref(norm), eps, plus

    def __call__(self, x: Tensor) -> Tensor:
        norm = self._norm()
        assert norm is not None  # which calls this
        weight = norm._parameters["weight"]
        is_plain = weight is not None and x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu"
        if (
            not is_plain
            or x.numel() > MOST_NUMBERS
            or torch.is_grad_enabled()
            or torch.compiler.is_compiling()
        ):
            return type(norm).forward(norm, x)
        assert weight is not None
        return self._native.rms_norm(x, weight, self._eps, self._plus)


def replace_norms(model: nn.Module, native: Native) -> int:
    """Let the kernels compute a model's RMS norms, found by trying; return how many there are."""
    found = 0
    for norm in model.modules():
        plus = _plus_of(norm, native)
        if plus is not None:
            norm.forward = _Forward(native, norm, _eps(norm), plus)  # type: ignore[assignment]
            found += 1
    return found


def _eps(norm: nn.Module) -> float:
    return float(getattr(norm, "variance_epsilon", getattr(norm, "eps", 0.0)))


@torch.inference_mode()
def _plus_of(norm: nn.Module, native: Native) -> float | None:
    """What a norm adds to its weight; None if it is no RMS norm that the kernels can compute."""
    weight = norm._parameters.get("weight")
    if not type(norm).__name__.endswith("RMSNorm") or len(norm._parameters) != 1 or norm._buffers:
        return None
    if weight is None or weight.ndim != 1 or weight.dtype != torch.float32 or not weight.is_contiguous():
        return None
    if weight.device.type != "cpu" or "forward" in vars(norm) or [*norm.children()]:
        return None
    random = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(2, 3, weight.numel(), generator=random, device="cpu")
    other = torch.randn(weight.numel(), generator=random, device="cpu")  # its own may be all ones
    try:
        expected = torch.func.functional_call(norm, {"weight": other}, (x,))
    except Exception:  # other arguments: not one of these
        return None
    for plus in (0.0, 1.0):
        found = native.rms_norm(x, other, _eps(norm), plus)
        if isinstance(expected, Tensor) and torch.allclose(found, expected, rtol=1e-5, atol=1e-5):
            return plus
    return None
