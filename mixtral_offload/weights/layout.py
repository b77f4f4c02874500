"""One expert: the positions of its tensors in one contiguous buffer, and how to run it from there.

A gated MLP (gate, up, down) only: no routers, no caches. One buffer makes one copy (2312.17238, section 3.3).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from mixtral_offload.weights.hqq import Fields, Linear, Quantization, dequantize, field_specs, infer, matmul

#: bytes: every tensor starts at a multiple, so that kernels may load whole vectors
ALIGNMENT = 64

#: tokens that one expert computes at a time: bounds the memory of a long prompt, and is enough for any GPU
ROWS = 1024

MATRICES = ("gate", "up", "down")
Sizes = dict[tuple[str, str], tuple[torch.dtype, int]]  # (matrix, field) -> dtype, number of elements


@dataclass(frozen=True)
class Field:
    """One stored tensor of an expert; offset and n_bytes in bytes within the buffer."""

    matrix: str
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    n_bytes: int


@dataclass(frozen=True)
class ExpertLayout:
    """The byte layout that all experts of a model share.

    Attributes:
        shapes: Matrix -> (N, K); gate and up are `[intermediate, hidden]`, down is `[hidden, intermediate]`.
        quantization: Matrix -> how it is stored.
        fields: All tensors, in the order of their offsets.
        n_bytes: Size of one buffer, a multiple of ALIGNMENT.
    """

    shapes: dict[str, tuple[int, int]]
    quantization: dict[str, Quantization]
    fields: tuple[Field, ...]
    n_bytes: int

    @classmethod
    def build(
        cls, hidden: int, intermediate: int, sizes: Sizes, path: Path | None = None, expert: str = "expert"
    ) -> ExpertLayout:
        """Derive the layout from the stored tensors' dtypes and element counts.

        Args:
            path: The expert's file, for errors.
            expert: Its name, for errors.

        Raises:
            CheckpointError: If they fit no format.
        """
        shapes = {
            "gate": (intermediate, hidden),
            "up": (intermediate, hidden),
            "down": (hidden, intermediate),
        }
        quantization, fields, offset = {}, [], 0
        for matrix in MATRICES:
            of_matrix = {field: size for (m, field), size in sizes.items() if m == matrix}
            quantization[matrix] = infer(shapes[matrix], of_matrix, path, f"{expert}: {matrix}")
            for name, (_, shape) in field_specs(shapes[matrix], quantization[matrix]).items():
                dtype = of_matrix[name][0]
                n_bytes = prod(shape) * dtype.itemsize
                fields.append(Field(matrix, name, dtype, shape, offset, n_bytes))
                offset += -(-n_bytes // ALIGNMENT) * ALIGNMENT
        return cls(shapes, quantization, tuple(fields), offset)

    def dequantized(self, dtype: torch.dtype) -> ExpertLayout:
        """Return the layout of the same expert with plain matrices of `dtype`, in transformers' order."""
        fields, offset = [], 0
        for matrix, shape in self.shapes.items():
            fields.append(Field(matrix, "weight", dtype, shape, offset, prod(shape) * dtype.itemsize))
            offset += fields[-1].n_bytes
        n_bytes = -(-offset // ALIGNMENT) * ALIGNMENT
        return ExpertLayout(self.shapes, dict.fromkeys(self.shapes, Quantization(16)), tuple(fields), n_bytes)

    @property
    def stored_bytes(self) -> int:
        """Size of the tensors, without padding."""
        return sum(field.n_bytes for field in self.fields)

    @property
    def kinds(self) -> tuple[str, ...]:
        """How the matrices are stored, as text: "32-bit", "2-bit, group 16, ..."."""
        wide = {field.matrix for field in self.fields if field.dtype == torch.float32}
        return tuple(
            sorted({"32-bit" if matrix in wide else str(of) for matrix, of in self.quantization.items()})
        )

    def views(self, buffer: Tensor) -> dict[str, Fields]:
        """Return matrix -> field -> tensor, as views of `buffer` (uint8 `[n_bytes]`)."""
        views: dict[str, Fields] = {matrix: {} for matrix in MATRICES}
        for field in self.fields:
            flat = buffer[field.offset : field.offset + field.n_bytes]
            views[field.matrix][field.name] = flat.view(field.dtype).view(field.shape)
        return views


def dequantize_expert(source: Tensor, layout: ExpertLayout, target: Tensor, plain: ExpertLayout) -> None:
    """Dequantize an expert.

    Args:
        source: uint8 `[layout.n_bytes]`.
        target: uint8 `[plain.n_bytes]`, to be filled.
    """
    views = layout.views(source)
    for matrix, fields in plain.views(target).items():
        weight, shape = fields["weight"], layout.shapes[matrix]
        weight.copy_(dequantize(views[matrix], shape, layout.quantization[matrix], weight.dtype))


def expert_forward(
    x: Tensor,
    views: dict[str, Fields],
    layout: ExpertLayout,
    apply_gate: Callable[[Tensor], Tensor],
    linear: Linear = matmul,
) -> Tensor:
    """Compute `down(apply_gate([gate(x), up(x)]))` from the packed bytes.

    Args:
        x: `[T, hidden]`.
        apply_gate: `[T, 2 * intermediate]` -> `[T, intermediate]`, transformers' own for the model family.
        linear: Product with a quantized matrix.

    Returns:
        `[T, hidden]`.
    """
    gate, up = (
        linear(x, views[matrix], layout.shapes[matrix], layout.quantization[matrix])
        for matrix in ("gate", "up")
    )
    hidden = apply_gate(torch.cat((gate, up), dim=-1))
    return linear(hidden, views["down"], layout.shapes["down"], layout.quantization["down"])
