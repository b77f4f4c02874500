"""Products of packed matrices, compiled, without dequantizing a whole matrix for a few tokens.

The packed layout of `weights/hqq.py` and torch.compile only: no caches, no models.
"""

from __future__ import annotations

import functools
import math
import os
import shutil
import sys
import types
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from mixtral_offload.errors import OptionError
from mixtral_offload.weights.bitpack import WORDS
from mixtral_offload.weights.hqq import Fields, Quantization, matmul, parts
from mixtral_offload.weights.layout import MATRICES, ExpertLayout, expert_forward

#: for more tokens, a matrix is dequantized, part by part, for a library product: the packed one costs the
#: same for each token, dequantizing about as much as ten tokens (LOG.md)
PACKED_TOKENS = 8
#: running sums that one loop keeps in registers
SUMS = 16
#: experts smaller than this run as fast uncompiled, and start at once
WORTH_COMPILING_BYTES = 4_000_000

Run = Callable[[Tensor, dict[str, Fields]], Tensor]  # (x [T, hidden], an expert's views) -> [T, hidden]


def packed_product(x: Tensor, fields: Fields, shape: tuple[int, int], quantization: Quantization) -> Tensor:
    """Compute `x [1, K] @ W.T` -> `[1, N]` in x's dtype, internally in fp32, if the group size divides N.

    In HQQ's layout (axis 0), row r of the unpacked view `[group_size, G * K]` holds rows r * G ... of the
    matrix, with G = N / group_size. So a scale and a zero belong to one g and one k, and to all rows g, g +
    G, g + 2G, ... Hence

        y[r * G + g] = sum_k q[r, g, k] * (scale * x)[g, k]  -  sum_k (zero * scale * x)[g, k]

    where the group's rows share the last sum. A value is masked in its word, not shifted; the power of two
    that this costs is taken back from the finished sum: one product and one sum per weight. If 3 bits are
    split, the high one is moved above the low ones first. torch.compile makes one loop of each expression, in
    C++ or Triton.
    """
    scale, zero = _scale_and_zero(fields, shape, quantization)  # [G, K/c, c]
    scaled = scale * x.float().view(scale.shape[1:])
    steps, per_step = n_steps(quantization), _per_step(quantization)
    together = max(n for n in range(1, steps + 1) if steps % n == 0 and n * per_step <= max(SUMS, per_step))
    words = [
        fields[part.name].view(-1, steps // together, together, *scale.shape) for part in parts(quantization)
    ]
    sums = [
        (value.float() * scaled).sum((-1, -2)) * 2.0**-shift
        for n in range(together)
        for value, shift in _in_place([of_part[:, :, n] for of_part in words], quantization)
    ]
    y = torch.stack(sums).view(together, per_step, steps // together, -1)
    y = y.permute(1, 2, 0, 3).reshape(per_step * steps, -1)  # rows by value, then step
    y = y[: quantization.group_size] - (zero * scaled).sum((-1, -2))
    return y.view(1, -1).to(x.dtype)


def _in_place(words: list[Tensor], quantization: Quantization) -> list[tuple[Tensor, int]]:
    """The values of a step's words, in the order of their rows, as `(value << shift, shift)`."""
    if not quantization.split:
        (of_part,), bits = words, quantization.bits
        return [(word & ((2**bits - 1) << shift), shift) for shift in _shifts(bits) for word in of_part]
    # one word of high bits serves two of low ones: moved up by one, it has its bits above the first one's
    # values; moved by two, above the second's. 32 bits have room for that, and processors have shifts for
    # them
    low, (high,) = (of_part.to(torch.int32) for of_part in words)
    return [
        ((word & (3 << shift)) | ((high << up) & (4 << shift)), shift)
        for shift in _shifts(2)
        for up, word in enumerate(low, 1)
    ]


def _per_step(quantization: Quantization) -> int:
    return max(WORDS[part.bits][0] for part in parts(quantization))


def n_steps(quantization: Quantization) -> int:
    """Return the number of steps over a matrix; each takes one word of the part that has fewest."""
    return -(-quantization.group_size // _per_step(quantization))


def step_words(fields: Fields, quantization: Quantization, step: int) -> list[Tensor]:
    """Return the words `[n, G * K]` of each part for one step.

    They hold rows step, step + n_steps, ... of the view `[group_size, G * K]`.
    """
    return [fields[part.name][step :: n_steps(quantization)] for part in parts(quantization)]


def planes(
    words: list[Tensor],
    fields: Fields,
    shape: tuple[int, int],
    quantization: Quantization,
    dtype: torch.dtype,
) -> list[Tensor]:
    """Dequantize the rows that these words hold (see `step_words`): a matrix `[G, K]` for each, in order."""
    scale, zero = _scale_and_zero(fields, shape, quantization)
    values = _in_place([of_part.view(-1, *scale.shape) for of_part in words], quantization)
    return [
        ((value.float() * 2.0**-shift - zero) * scale).to(dtype).view(-1, shape[1]) for value, shift in values
    ]


def _shifts(bits: int) -> list[int]:
    """The position of each value in a word, the highest first."""
    return [bits * i for i in reversed(range(WORDS[bits][0]))]


def _scale_and_zero(
    fields: Fields, shape: tuple[int, int], quantization: Quantization
) -> tuple[Tensor, Tensor]:
    """Scale and zero, fp32 `[G, K/c, c]`.

    Quantized scales repeat their own scale after c, so that no loop needs a modulo.
    """
    meta, repeats = fields.get("meta.meta_scale.scale"), quantization.scale_group_size or 1
    c = shape[1] if meta is None else math.gcd(meta.numel(), shape[1])
    grid = (shape[0] // quantization.group_size, shape[1] // c, c)

    def spread(values: Tensor) -> Tensor:
        repeated = values.view(1, -1, c).expand(repeats, -1, c)
        return repeated.reshape(grid).float()

    if meta is None:
        scale = fields["meta.scale"].view(grid).float()
    else:
        scale = fields["meta.scale_q"].view(grid).float() - spread(fields["meta.meta_scale.zero"])
        scale = scale * spread(meta)
    if "meta.zero" in fields:
        return scale, fields["meta.zero"].view(grid).float()
    zero = fields["meta.zero_q"].view(grid).float() - fields["meta.meta_zero.zero"].float()
    return scale, zero * fields["meta.meta_zero.scale"].float()


def can_pack(shape: tuple[int, int], quantization: Quantization) -> bool:
    """Return whether packed products exist for a matrix; others are dequantized whole."""
    return quantization.bits == 16 or shape[0] % quantization.group_size == 0


def dequantized_bytes(
    shape: tuple[int, int], quantization: Quantization, item_bytes: int, compiled: bool
) -> int:
    """Return the memory for multiplying many tokens, in addition to the matrix.

    Compiled, it holds the planes of one step; else the whole dequantized matrix, and an intermediate result
    in fp16.
    """
    n_weights = math.prod(shape)
    if not compiled or quantization.bits == 16 or not can_pack(shape, quantization):
        return (2 + item_bytes) * n_weights
    return item_bytes * n_weights // n_steps(quantization)


def linear(x: Tensor, fields: Fields, shape: tuple[int, int], quantization: Quantization) -> Tensor:
    """Compute `x [T, K] @ W.T` -> `[T, N]` by compiled products: token by token for few, else from planes."""
    if not can_pack(shape, quantization) or (quantization.bits == 16 and len(x) > PACKED_TOKENS):
        return matmul(x, fields, shape, quantization)
    fields = _widened(fields, quantization)
    if len(x) <= PACKED_TOKENS:
        product = _compiled_product(shape, quantization)
        return torch.cat([product(row, fields) for row in x.split(1)])
    y = x.new_empty(len(x), quantization.group_size, shape[0] // quantization.group_size)
    rest = {name: value for name, value in fields.items() if name.startswith("meta.")}
    dequantize, steps = _compiled_planes(shape, quantization), n_steps(quantization)
    for step in range(steps):
        rows = range(step, quantization.group_size, steps)
        for row, plane in zip(rows, dequantize(step_words(fields, quantization, step), rest, x.dtype)):
            y[:, row] = F.linear(x, plane)
    return y.view(len(x), -1)


def make_run(layout: ExpertLayout, apply_gate: Callable[[Tensor], Tensor], compiled: bool) -> Run:
    """Return the function that runs an expert from its views: compiled, a token at decode sizes is one call.

    Args:
        apply_gate: See `expert_forward`, the uncompiled equivalent.
    """
    if not compiled or not all(can_pack(layout.shapes[m], layout.quantization[m]) for m in MATRICES):
        return functools.partial(expert_forward, layout=layout, apply_gate=apply_gate)

    def one_token(x: Tensor, views: dict[str, Fields]) -> Tensor:
        gate, up = (_product(x, views[m], layout.shapes[m], layout.quantization[m]) for m in ("gate", "up"))
        hidden = apply_gate(torch.cat((gate, up), dim=-1))
        return _product(hidden, views["down"], layout.shapes["down"], layout.quantization["down"])

    one_token = _compile(one_token)

    def run(x: Tensor, views: dict[str, Fields]) -> Tensor:
        if len(x) > PACKED_TOKENS:
            return expert_forward(x, views, layout, apply_gate, linear)
        views = {m: _widened(views[m], layout.quantization[m]) for m in MATRICES}
        return torch.cat([one_token(row, views) for row in x.split(1)])

    return run


def _product(x: Tensor, fields: Fields, shape: tuple[int, int], quantization: Quantization) -> Tensor:
    if quantization.bits == 16:
        return (fields["weight"].view(shape).float() * x.float()).sum(-1).view(1, -1).to(x.dtype)
    return packed_product(x, fields, shape, quantization)


def _widened(fields: Fields, quantization: Quantization) -> Fields:
    """Convert fp16 fields to fp32 where that is faster: on the CPU.

    There, fp16 in a loop makes it handle 32 values at a time although 16 fill a register: half as fast, and
    seven times slower with the int32 words of hqq's 3 bits. The scales of scales are few and stay; with
    int32, convert all.
    """
    if (
        quantization.bits == 16
        or fields["W_q"].device.type != "cpu"
        or (fields["W_q"].dtype != torch.int32 and quantization.scale_group_size is None)
    ):
        return fields
    return {name: value.float() if value.dtype == torch.float16 else value for name, value in fields.items()}


@functools.cache
def _compiled_product(shape: tuple[int, int], quantization: Quantization) -> Callable[..., Tensor]:
    return _compile(lambda x, fields: _product(x, fields, shape, quantization))


@functools.cache
def _compiled_planes(shape: tuple[int, int], quantization: Quantization) -> Callable[..., list[Tensor]]:
    return _compile(lambda words, fields, dtype: planes(words, fields, shape, quantization, dtype))


def _compile(function: Callable) -> Callable:
    """Compile for one set of shapes, as a separate code object.

    torch counts recompilations by code object and would give up at the ninth shape.
    """
    own = types.FunctionType(
        function.__code__.replace(), function.__globals__, function.__name__, None, function.__closure__
    )
    return torch.compile(own, dynamic=False, fullgraph=True)


def choose(compile: bool | str, layout: ExpertLayout, device: torch.device) -> tuple[bool, str]:
    """Decide whether to compile.

    Args:
        compile: As in `OffloadOptions`.

    Returns:
        Whether to compile, and why.

    Raises:
        OptionError: For True if it is impossible.
    """
    if compile is False:
        return False, "as asked"
    if compile == "auto" and layout.n_bytes < WORTH_COMPILING_BYTES:
        return False, "experts are small: uncompiled they start at once"
    missing = _missing(device)
    if missing and compile is True:
        raise OptionError(
            "cannot compile", found=f"no {missing}", hint=f"install {missing}, or use compile=False"
        )
    return (
        not missing,
        f"no {missing} here: install it for more speed" if missing else "products from packed bytes",
    )


def _missing(device: torch.device) -> str | None:
    """What torch.compile needs for this device and does not find; None: nothing."""
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        return None if has_triton() else "triton"
    name = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")  # torch's own choice
    return None if shutil.which(name) else f"C++ compiler ({name})"
