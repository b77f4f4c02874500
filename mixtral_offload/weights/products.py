"""Which code multiplies a model's packed matrices: the package's kernels, torch.compile's, or torch's own."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor
from torch.nn import functional as F

from mixtral_offload.errors import OptionError
from mixtral_offload.weights import kernels
from mixtral_offload.weights.hqq import Linear, Quantization, matmul
from mixtral_offload.weights.kernels import Run, can_pack
from mixtral_offload.weights.layout import MATRICES, ExpertLayout, expert_forward
from mixtral_offload.weights.native import Native, NativeExperts, NativeLinear, find_native, is_missing

Gate = Callable[[Tensor], Tensor]  # [T, 2 * intermediate] -> [T, intermediate]
PRECISIONS = ("exact", "fast")


class Kind(Enum):
    """The code that computes products."""

    NATIVE = "kernels of this package"
    COMPILED = "torch.compile"
    PLAIN = "dequantized, then torch's product"


@dataclass(frozen=True)
class Products:
    """How a model's packed matrices are multiplied.

    Attributes:
        kind: The code.
        why: The reason, and what would be faster if it is missing.
        native: The kernels, for `Kind.NATIVE`.
        fast: Activations in 8 bits.
    """

    kind: Kind
    why: str
    native: Native | None = None
    fast: bool = False

    def __str__(self) -> str:
        if self.native is None:
            return f"{self.kind.value} ({self.why})"
        return f"{self.kind.value}: {self.native.name}, {'fast' if self.fast else 'exact'}"

    @property
    def linear(self) -> Linear:
        """The product with one quantized matrix."""
        if self.native is not None:
            return NativeLinear(self.native, self.fast)
        return kernels.linear if self.kind is Kind.COMPILED else matmul

    def make_run(self, layout: ExpertLayout, apply_gate: Gate, experts: NativeExperts | None = None) -> Run:
        """Return the function that runs one expert from its views.

        Args:
            experts: What `make_experts` returned: a single expert's results are bit-identical to many's.
        """
        if experts is not None:
            return experts.run_one
        if self.native is not None:
            return functools.partial(expert_forward, layout=layout, apply_gate=apply_gate, linear=self.linear)
        return kernels.make_run(layout, apply_gate, self.kind is Kind.COMPILED)

    def make_experts(self, layout: ExpertLayout, apply_gate: Gate) -> NativeExperts | None:
        """Return what runs all experts of a layer in one call, if there is such a kernel."""
        is_silu = self.native is not None and is_silu_gate(apply_gate, layout.shapes["gate"][0])
        possible = all(can_pack(layout.shapes[of], layout.quantization[of]) for of in MATRICES)
        return self.native.experts(layout, self.fast) if self.native and is_silu and possible else None

    def dequantized_bytes(self, shape: tuple[int, int], quantization: Quantization, item_bytes: int) -> int:
        """Return the memory for multiplying many tokens, in addition to the matrix."""
        if self.native is not None and quantization.bits != 16 and can_pack(shape, quantization):
            return 0  # tiles that fit a processor's cache
        compiled = self.kind is Kind.COMPILED
        return kernels.dequantized_bytes(shape, quantization, item_bytes, compiled)


@torch.inference_mode()
def is_silu_gate(apply_gate: Gate, intermediate: int) -> bool:
    """Return whether a family's activation is `silu(gate) * up`, which the kernels compute, by trying it."""
    random = torch.Generator().manual_seed(0)
    x = 30 * torch.randn(8, 2 * intermediate, generator=random, dtype=torch.float32, device="cpu")
    gate, up = x.chunk(2, dim=-1)
    return torch.allclose(apply_gate(x), F.silu(gate) * up, rtol=1e-5, atol=1e-6)


#: torch's own products of dequantized matrices, which autograd can follow
PLAIN = Products(Kind.PLAIN, "for gradients")


def choose_products(
    compile: bool | str, precision: str, layout: ExpertLayout, device: torch.device
) -> Products:
    """Choose how to multiply.

    Args:
        compile: As in `OffloadOptions`.
        precision: As in `OffloadOptions`.

    Raises:
        OptionError: For compile=True or precision="fast" if that is impossible.
    """
    native, why_not = find_native() if device.type == "cpu" else (None, "only on the CPU")
    if compile is not True and native is not None:
        return Products(Kind.NATIVE, "the fastest here", native, precision == "fast")
    if precision == "fast":
        found = "compile=True" if native is not None else why_not
        raise OptionError(
            'precision="fast" needs the kernels of this package', found=found, hint='use precision="exact"'
        )
    is_compiled, why = kernels.choose(compile, layout, device)
    if device.type == "cpu" and compile is not True:
        why = f"{why}; no kernels of this package: {why_not}"
        if is_missing():
            warnings.warn(f"products are slow here: {why_not}", stacklevel=2)
    return Products(Kind.COMPILED if is_compiled else Kind.PLAIN, why)
