"""One expert: where its tensors lie inside one contiguous buffer, and how to run it from there.

Knows one expert of a gated MLP (gate, up, down). Knows nothing of routers, caches or where the buffer came
from. One buffer per expert makes a copy to the device one transfer (2312.17238, section 3.3).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from mixtral_offload.weights.hqq import Fields, Quantization, dequantize, field_specs, infer, matmul

#: every tensor starts at a multiple of this many bytes, so that kernels may load whole vectors
ALIGNMENT = 64

#: tokens that one expert computes at a time: bounds the memory of a long prompt, and fills any card
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

    shapes: matrix -> (N, K); gate and up are [intermediate, hidden], down is [hidden, intermediate].
    n_bytes: size of one buffer, a multiple of ALIGNMENT. stored_bytes: the same without padding.
    """

    shapes: dict[str, tuple[int, int]]
    quantization: dict[str, Quantization]
    fields: tuple[Field, ...]
    n_bytes: int

    @classmethod
    def build(
        cls, hidden: int, intermediate: int, sizes: Sizes, path: Path | None = None, expert: str = "expert"
    ) -> ExpertLayout:
        """From the stored tensors' dtypes and element counts; raises CheckpointError where they fit no
        format.

        path, expert: the file and the expert's name, for errors.
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
        """The same expert with plain matrices of `dtype`, after each other as transformers has them."""
        fields, offset = [], 0
        for matrix, shape in self.shapes.items():
            fields.append(Field(matrix, "weight", dtype, shape, offset, prod(shape) * dtype.itemsize))
            offset += fields[-1].n_bytes
        n_bytes = -(-offset // ALIGNMENT) * ALIGNMENT
        return ExpertLayout(self.shapes, dict.fromkeys(self.shapes, Quantization(16)), tuple(fields), n_bytes)

    @property
    def stored_bytes(self) -> int:
        return sum(field.n_bytes for field in self.fields)

    @property
    def kinds(self) -> tuple[str, ...]:
        """How the matrices are stored, in words: "32-bit", "2-bit, group 16, ..."."""
        wide = {field.matrix for field in self.fields if field.dtype == torch.float32}
        return tuple(
            sorted({"32-bit" if matrix in wide else str(of) for matrix, of in self.quantization.items()})
        )

    def views(self, buffer: Tensor) -> dict[str, Fields]:
        """matrix -> field -> tensor, as views of `buffer` (uint8 [n_bytes]); nothing is copied."""
        views: dict[str, Fields] = {matrix: {} for matrix in MATRICES}
        for field in self.fields:
            flat = buffer[field.offset : field.offset + field.n_bytes]
            views[field.matrix][field.name] = flat.view(field.dtype).view(field.shape)
        return views


def dequantize_expert(source: Tensor, layout: ExpertLayout, target: Tensor, plain: ExpertLayout) -> None:
    """Fill `target` (uint8 [plain.n_bytes], of the layout `plain`) with what `source` (uint8 [layout.n_bytes]) holds."""
    views = layout.views(source)
    for matrix, fields in plain.views(target).items():
        weight, shape = fields["weight"], layout.shapes[matrix]
        weight.copy_(dequantize(views[matrix], shape, layout.quantization[matrix], weight.dtype))


def expert_forward(
    x: Tensor,
    views: dict[str, Fields],
    layout: ExpertLayout,
    apply_gate: Callable[[Tensor], Tensor],
    linear=matmul,
) -> Tensor:
    """`down(apply_gate([gate(x), up(x)]))` for `x [T, hidden]` -> `[T, hidden]`, from the packed bytes.

    apply_gate: `[T, 2 * intermediate]` -> `[T, intermediate]`, transformers' own for the model family.
        linear: the
    product with a quantized matrix, with `hqq.matmul`'s arguments.
    """
    gate, up = (
        linear(x, views[matrix], layout.shapes[matrix], layout.quantization[matrix])
        for matrix in ("gate", "up")
    )
    hidden = apply_gate(torch.cat((gate, up), dim=-1))
    return linear(hidden, views["down"], layout.shapes["down"], layout.quantization["down"])
