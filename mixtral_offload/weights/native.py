"""The package's own kernels for CPUs, in `native/`: find them, check them, call them.

The packed layout of `weights/hqq.py` and pointers only: no caches, no models.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import math
import os
import sys
import threading
from collections.abc import Sequence
from importlib.machinery import EXTENSION_SUFFIXES
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from mixtral_offload.errors import OptionError
from mixtral_offload.weights.hqq import Fields, Quantization, field_specs, matmul
from mixtral_offload.weights.kernels import can_pack
from mixtral_offload.weights.layout import MATRICES, ExpertLayout

FOLDER = Path(__file__).parent.parent / "native"
#: environment variable: the name of an instruction set, or "none" for torch's own products
FORCE = "MIXTRAL_OFFLOAD_KERNELS"
NAMES = ("avx512_vnni", "avx512", "avx2", "neon", "portable")
#: experts of one call: MAX_EXPERTS in native/entry.c
MOST_EXPERTS = 64
#: enum in native/interface.h, of what is not simply a number of bits
TEN_IN_32, SPLIT = 10, 3
FLOATS = {torch.float16: 16, torch.bfloat16: 17, torch.float32: 32}
POINTERS = {
    "words": "W_q",
    "high": "W_high",
    "scale": ("meta.scale_q", "meta.scale"),
    "zero": ("meta.zero_q", "meta.zero"),
    "meta_scale": "meta.meta_scale.scale",
    "meta_zero": "meta.meta_scale.zero",
    "zero_scale": "meta.meta_zero.scale",
    "zero_zero": "meta.meta_zero.zero",
}


class Matrix(ctypes.Structure):
    """`Matrix` of native/interface.h: pointers, or offsets within an expert's row."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, ctypes.c_int64) for name in ("n", "k", "group", "n_meta", "format")),
    ]


class Expert(ctypes.Structure):
    """`Expert` of native/entry.c."""

    _fields_ = [(matrix, Matrix) for matrix in MATRICES]


def source_hash() -> str:
    """Return a hash of the C sources, which a build of them keeps."""
    digest = hashlib.sha256()
    for path in sorted([*FOLDER.glob("*.c"), *FOLDER.glob("*.h")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


class _Scratch(threading.local):
    """Memory of one thread, which grows as calls need it, and is freed with the thread."""

    def __init__(self) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8, device="cpu")

    def of(self, n_bytes: int) -> int:
        if self.memory.numel() < n_bytes:
            self.memory = torch.empty(n_bytes, dtype=torch.uint8, device="cpu")
        return self.memory.data_ptr()


def _pointer(numbers: Tensor) -> int:
    """Address of a tensor that the kernels read or write: fp32 in RAM without gaps, or a RuntimeError.

    They trust it, and another type's memory ends earlier.
    """
    if numbers.dtype != torch.float32 or not numbers.is_cpu or not numbers.is_contiguous():
        found = f"{numbers.dtype} on {numbers.device}, strides {numbers.stride()}"
        raise RuntimeError(f"the kernels need contiguous float32 numbers on the CPU, found {found}")
    return numbers.data_ptr()


def _empty(*shape: int) -> Tensor:
    """What the kernels write: of their type, whatever torch's default type and device are."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


class Native:
    """The kernels of one instruction set.

    Args:
        library: The built library.
        name: One of NAMES; "": the best that the processor has.

    Attributes:
        name: Of the instruction set.

    Raises:
        OptionError: If the processor lacks it.
    """

    def __init__(self, library: ctypes.CDLL, name: str = ""):
        pointer, integer, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
        library.find_kernels.restype, library.name_of.restype = pointer, ctypes.c_char_p
        found = library.find_kernels(name.encode())
        if not found:
            raise OptionError(
                "this processor lacks an instruction set", key=FORCE, found=name, hint=f"unset {FORCE}"
            )
        self._library, self._kernels = library, pointer(found)
        self.name = library.name_of(self._kernels).decode()
        for function in (library.experts_scratch, library.matrix_scratch):
            function.restype = integer
        library.experts_scratch.argtypes = [pointer, integer, integer, integer]
        library.matrix_scratch.argtypes = [pointer, integer, integer]
        library.multiply_matrix.restype = library.run_experts.restype = None
        library.multiply_matrix.argtypes = [
            *(pointer, pointer, pointer, integer, pointer, integer, integer, pointer)
        ]
        library.run_experts.argtypes = [
            *(pointer, pointer, pointer, pointer, integer, pointer, integer, pointer, pointer),
            *(integer, integer, pointer),
        ]
        library.weighted_sums.restype = library.rms_norm.restype = None
        library.rms_norm.argtypes = [pointer, pointer, integer, integer, real, real, pointer]
        library.weighted_sums.argtypes = [pointer, pointer, integer, integer, integer, pointer, integer]
        library.set_pool.argtypes = [pointer]
        library.set_pool(_torch_pool())
        self._scratch = _Scratch()

    def linear(
        self,
        x: Tensor,
        fields: Fields,
        shape: tuple[int, int],
        quantization: Quantization,
        fast: bool = False,
    ) -> Tensor:
        """Compute `x [T, K] @ W.T` -> `[T, N]` in x's dtype, internally in fp32.

        Args:
            fast: Activations as int8 in blocks of 256; else int16.
        """
        product = self.prepare(fields, shape, quantization, fast)
        return matmul(x, fields, shape, quantization) if product is None else product(x)

    def prepare(
        self, fields: Fields, shape: tuple[int, int], quantization: Quantization, fast: bool = False
    ) -> NativeProduct | None:
        """Return what multiplies by this matrix, valid as long as its tensors' memory; None: torch must."""
        if not can_pack(shape, quantization):
            return None
        if quantization.bits == 16 and fields["weight"].dtype == torch.float32:
            return None  # nothing to unpack
        return NativeProduct(self, matrix_of(fields, shape, quantization), fast)

    def weighted_sums(self, y: Tensor, weights: Tensor) -> Tensor:
        """Sum each token's results: fp32 `y [T, k, H]`, `weights [T, k]` -> `[T, H]`, in the order of k.

        torch's own sum has another order for other shapes: a token's bits would depend on those beside it.
        """
        tokens, k, hidden = y.shape
        if k == 0:
            return _empty(tokens, hidden).zero_()
        if weights.shape != (tokens, k):
            raise RuntimeError(f"weights {tuple(weights.shape)}, expected {(tokens, k)}")
        y, weights, found = y.contiguous(), weights.contiguous(), _empty(tokens, hidden)
        self._library.weighted_sums(
            *(_pointer(y), _pointer(weights), tokens, k, hidden, _pointer(found)),
            torch.get_num_threads(),
        )
        return found

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, plus: float) -> Tensor:
        """Compute `x / sqrt(mean(x**2) + eps) * (plus + weight)` over the last dimension, in fp32.

        Args:
            x: fp32 `[..., N]`, with few rows: one thread.
            weight: fp32 `[N]`, contiguous.
        """
        x, n = x.contiguous(), weight.numel()
        if x.shape[-1:] != weight.shape:
            raise RuntimeError(f"input of {x.shape[-1]} columns, expected {n}")
        y = torch.empty_like(x)
        self._library.rms_norm(_pointer(x), _pointer(weight), x.numel() // n, n, eps, plus, _pointer(y))
        return y

    def experts(self, layout: ExpertLayout, fast: bool = False) -> NativeExperts:
        """Return what runs experts of a layout, whose activation is `silu(gate) * up`."""
        return NativeExperts(self, layout, fast)


class NativeProduct:
    """Multiplies by one matrix, which is described to the kernels once.

    Args:
        native: The kernels.
        matrix: What describes it.
        fast: See `Native.linear`.
    """

    def __init__(self, native: Native, matrix: Matrix, fast: bool):
        self._native, self._matrix, self._fast = native, matrix, fast
        self._at, self._rows, self._columns = ctypes.byref(matrix), int(matrix.n), int(matrix.k)

    def __call__(self, x: Tensor) -> Tensor:
        """Compute `x [..., K] @ W.T` -> `[..., N]` in x's dtype."""
        native, threads, shape = self._native, torch.get_num_threads(), x.shape[:-1]
        if x.shape[-1:] != (self._columns,) or not x.is_floating_point():
            found = f"{x.dtype} of shape {tuple(x.shape)}"
            raise RuntimeError(f"input {found}, expected floating point, {self._columns} columns")
        library, rows, tokens = native._library, x.float().contiguous(), shape.numel()
        n_bytes = library.matrix_scratch(self._at, tokens, threads)
        y = _empty(*shape, self._rows)
        library.multiply_matrix(
            *(native._kernels, self._at, _pointer(rows), tokens, _pointer(y), threads, self._fast),
            native._scratch.of(n_bytes),
        )
        return y if x.dtype == y.dtype else y.to(x.dtype)


class NativeLinear:
    """A quantized layer's product by the kernels; `hqq.QuantizedLinear` prepares it once.

    Args:
        native: The kernels.
        fast: See `Native.linear`.
    """

    def __init__(self, native: Native, fast: bool = False):
        self._native, self._fast = native, fast

    def __call__(
        self, x: Tensor, fields: Fields, shape: tuple[int, int], quantization: Quantization
    ) -> Tensor:
        """Compute `x [T, K] @ W.T` -> `[T, N]`."""
        product = self.prepare(fields, shape, quantization)
        return matmul(x, fields, shape, quantization) if product is None else product(x)

    def prepare(
        self, fields: Fields, shape: tuple[int, int], quantization: Quantization
    ) -> NativeProduct | None:
        """See `Native.prepare`; None also for tensors that were exchanged for others than stored ones."""
        for name, (dtype, dims) in field_specs(shape, quantization).items():
            value, is_float = fields[name], quantization.bits == 16
            known = value.dtype in FLOATS if is_float else value.dtype == dtype
            if not (known and value.is_cpu and value.is_contiguous() and value.numel() == math.prod(dims)):
                return None
        return self._native.prepare(fields, shape, quantization, self._fast)


class NativeExperts:
    """Runs experts from the addresses of their rows: one call for all of a layer.

    Args:
        native: The kernels.
        layout: Of the experts.
        fast: See `Native.linear`.
    """

    def __init__(self, native: Native, layout: ExpertLayout, fast: bool):
        self._native, self._fast = native, fast
        self._layout = expert_of(layout)
        self._at = ctypes.byref(self._layout)
        self.hidden = layout.shapes["gate"][1]

    def run(self, x: Tensor, addresses: Sequence[int], counts: Sequence[int] | None = None) -> Tensor:
        """Run experts.

        Args:
            x: `[1, H]` for all experts, or the rows `[sum(counts), H]` of each, one after the other.
            addresses: Of each expert's row in memory.
            counts: Rows of x for each expert; None: all have the same single row.

        Returns:
            `[rows, H]`, fp32; a row for each expert if all have the same.
        """
        n = len(addresses)
        if n > MOST_EXPERTS:
            first, rest = addresses[:MOST_EXPERTS], addresses[MOST_EXPERTS:]
            if counts is None:
                return torch.cat((self.run(x, first), self.run(x, rest)))
            at = sum(counts[:MOST_EXPERTS])
            return torch.cat(
                (
                    self.run(x[:at], first, counts[:MOST_EXPERTS]),
                    self.run(x[at:], rest, counts[MOST_EXPERTS:]),
                )
            )
        y = _empty(n if counts is None else sum(counts), self.hidden)
        self._call(x, addresses, counts, None, y)
        return y

    def run_token(self, x: Tensor, addresses: Sequence[int], weights: Tensor) -> Tensor:
        """Run the experts of one token and sum their results, as `Native.weighted_sums` does.

        Args:
            x: fp32 `[1, H]`.
            addresses: Of each expert's row in memory, in the order of the sum; at most MOST_EXPERTS.
            weights: fp32 `[1, experts]`.

        Returns:
            fp32 `[1, H]`.
        """
        if weights.shape != (1, len(addresses)):
            raise RuntimeError(f"weights {tuple(weights.shape)}, expected {(1, len(addresses))}")
        y = _empty(1, self.hidden)
        self._call(x, addresses, None, weights.contiguous(), y)
        return y

    def _call(
        self,
        x: Tensor,
        addresses: Sequence[int],
        counts: Sequence[int] | None,
        weights: Tensor | None,
        y: Tensor,
    ) -> None:
        native, library, threads = self._native, self._native._library, torch.get_num_threads()
        n = len(addresses)
        starts = range(n + 1) if counts is None else (0, *accumulate(counts))
        rows, most = x.float().contiguous(), max(counts) if counts else 1
        expected = (1 if counts is None else starts[-1], self.hidden)
        if rows.shape != expected:
            raise RuntimeError(f"input {tuple(rows.shape)}, expected {expected}")
        n_bytes = library.experts_scratch(self._at, starts[-1], most, threads)
        pointers, integers = _arrays(n)
        library.run_experts(
            *(native._kernels, self._at, pointers(*addresses), integers(*starts), n),
            *(_pointer(rows), counts is None, None if weights is None else _pointer(weights)),
            *(_pointer(y), threads, self._fast, native._scratch.of(n_bytes)),
        )

    def run_one(self, x: Tensor, views: dict[str, Fields]) -> Tensor:
        """Run one expert, `x [T, H]` -> `[T, H]` in x's dtype, from views of its row."""
        first = next(iter(views["gate"].values()))  # the row begins with it
        return self.run(x, [first.data_ptr()], [len(x)]).to(x.dtype)


@functools.cache
def _arrays(n: int) -> tuple[type[ctypes.Array], type[ctypes.Array]]:
    """The types of n pointers and of n + 1 integers."""
    return ctypes.c_void_p * n, ctypes.c_int64 * (n + 1)


def _format(quantization: Quantization, dtype: torch.dtype) -> int:
    if quantization.bits == 16:
        return FLOATS[dtype]
    if quantization.bits == 3:
        return SPLIT if quantization.split else TEN_IN_32
    return quantization.bits


def _matrix(
    shape: tuple[int, int],
    quantization: Quantization,
    at: dict[str, int],
    dtype: torch.dtype,
    n_meta: int,
) -> Matrix:
    matrix = Matrix(
        n=shape[0],
        k=shape[1],
        group=quantization.group_size or 1,
        n_meta=n_meta,
        format=_format(quantization, dtype),
    )
    if quantization.bits == 16:
        matrix.words = at["weight"]
        return matrix
    for pointer, names in POINTERS.items():
        for name in (names,) if isinstance(names, str) else names:
            if name in at:
                setattr(matrix, pointer, at[name])
                break
    return matrix


def matrix_of(fields: Fields, shape: tuple[int, int], quantization: Quantization) -> Matrix:
    """Return what describes a matrix to the kernels; valid as long as its tensors."""
    at = {name: value.data_ptr() for name, value in fields.items()}
    meta = fields.get("meta.meta_scale.scale")
    dtype = next(iter(fields.values())).dtype
    return _matrix(shape, quantization, at, dtype, 0 if meta is None else meta.numel())


def expert_of(layout: ExpertLayout) -> Expert:
    """Return what describes every expert of a layout to the kernels, with offsets in place of pointers."""
    expert = Expert()
    for name, shape in layout.shapes.items():
        of = {field.name: field for field in layout.fields if field.matrix == name}
        meta = of.get("meta.meta_scale.scale")
        n_meta = 0 if meta is None else meta.n_bytes // meta.dtype.itemsize
        at = {field.name: field.offset for field in of.values()}
        dtype = next(iter(of.values())).dtype
        setattr(expert, name, _matrix(shape, layout.quantization[name], at, dtype, n_meta))
    return expert


def _torch_pool() -> int | None:
    """The address of GOMP_parallel in the OpenMP library that torch has loaded; None: there is none."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value
    except (AttributeError, OSError, TypeError):
        return None


@functools.cache
def _library() -> tuple[ctypes.CDLL | None, str]:
    """The built library, or None and why there is none."""
    again = "build it again: pip install -e . (or --force-reinstall) where there is a C compiler"
    if sys.byteorder != "little":
        return None, "no kernels for big-endian processors"
    paths = [path for suffix in EXTENSION_SUFFIXES for path in FOLDER.glob(f"library{suffix}")]
    if not paths:
        return None, f"the package was installed without a C compiler; {again}"
    try:
        library = ctypes.CDLL(str(paths[0]))
        library.built_from.restype = ctypes.c_char_p
        built_from = library.built_from().decode()
    except (OSError, AttributeError) as error:
        return None, f"the built kernels cannot be loaded ({error}); {again}"
    if built_from != source_hash():
        return None, f"the built kernels are not of these sources; {again}"
    return library, ""


@functools.cache
def _find(forced: str) -> tuple[Native | None, str]:
    if forced == "none":
        return None, f"{FORCE}=none"
    if forced and forced not in NAMES:
        raise OptionError("unknown kernels", key=FORCE, expected=", ".join((*NAMES, "none")), found=forced)
    library, why = _library()
    if library is None:
        if forced:
            raise OptionError("no kernels", key=FORCE, found=why)
        return None, why
    return Native(library, forced), ""


def is_missing() -> bool:
    """Return whether there are no kernels here although the environment does not forbid them."""
    return _library()[0] is None and os.environ.get(FORCE) != "none"


def find_native() -> tuple[Native | None, str]:
    """Find the kernels for this processor, or those that the environment forces.

    Returns:
        The kernels, or None and the reason with the next step.

    Raises:
        OptionError: If the environment forces kernels that do not exist here.
    """
    return _find(os.environ.get(FORCE, ""))
