"""The package's own kernels for CPUs, in `native/`: find them, check them, call them.

The packed layout of `weights/hqq.py` and pointers only: no caches, no models.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import sys
import threading
from collections.abc import Sequence
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from torch import Tensor

from mixtral_offload.errors import OptionError
from mixtral_offload.weights.hqq import Fields, Quantization, matmul
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
        pointer, integer = ctypes.c_void_p, ctypes.c_int64
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
            *(pointer, pointer, pointer, pointer, integer, pointer, integer, pointer),
            *(integer, integer, pointer),
        ]
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
        if not can_pack(shape, quantization):
            return matmul(x, fields, shape, quantization)
        if quantization.bits == 16 and fields["weight"].dtype == torch.float32:
            return matmul(x, fields, shape, quantization)  # nothing to unpack
        matrix, rows = matrix_of(fields, shape, quantization), x.float().contiguous()
        y = torch.empty(len(x), shape[0], device="cpu")
        threads = torch.get_num_threads()
        scratch = self._scratch.of(self._library.matrix_scratch(ctypes.byref(matrix), len(x), threads))
        self._library.multiply_matrix(
            *(self._kernels, ctypes.byref(matrix), rows.data_ptr(), len(x), y.data_ptr(), threads, fast),
            scratch,
        )
        return y.to(x.dtype)

    def experts(self, layout: ExpertLayout, fast: bool = False) -> NativeExperts:
        """Return what runs experts of a layout, whose activation is `silu(gate) * up`."""
        return NativeExperts(self, layout, fast)


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
        native, library, threads = self._native, self._native._library, torch.get_num_threads()
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
        starts = list(range(n + 1)) if counts is None else [0]
        for count in counts or ():
            starts.append(starts[-1] + count)
        rows = x.float().contiguous()
        y = torch.empty(starts[-1], self.hidden, device="cpu")
        layout = ctypes.byref(self._layout)
        most = max(counts) if counts else 1
        scratch = native._scratch.of(library.experts_scratch(layout, starts[-1], most, threads))
        library.run_experts(
            *(
                native._kernels,
                layout,
                (ctypes.c_void_p * n)(*addresses),
                (ctypes.c_int64 * (n + 1))(*starts),
                n,
            ),
            *(rows.data_ptr(), counts is None, y.data_ptr(), threads, self._fast, scratch),
        )
        return y

    def run_one(self, x: Tensor, views: dict[str, Fields]) -> Tensor:
        """Run one expert, `x [T, H]` -> `[T, H]` in x's dtype, from views of its row."""
        first = next(iter(views["gate"].values()))  # the row begins with it
        return self.run(x, [first.data_ptr()], [len(x)]).to(x.dtype)


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
