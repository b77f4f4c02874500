"""HQQ-quantized matrices: solve, store, recognise, dequantize, multiply. One matrix at a time: no experts, no
files.

A matrix `W [N, K]` is seen as `[group_size, G]`, G = N * K / group_size (HQQ's axis 0): each column has a
scale and a zero, W = (q - zero) * scale. The tensors ("fields") have the names of the published Mixtral-8x7B
checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import functional as F

from mixtral_offload.errors import CheckpointError, OptionError
from mixtral_offload.weights.bitpack import WORDS, pack, unpack

Fields = dict[str, Tensor]
FieldSpecs = dict[str, tuple[torch.dtype, tuple[int, ...]]]
Linear = Callable[[Tensor, Fields, tuple[int, int], "Quantization"], Tensor]  # see `matmul`
#: makes a product with one matrix, valid as long as its memory; None: `Linear` must do it
Prepare = Callable[[Fields, tuple[int, int], "Quantization"], "Callable[[Tensor], Tensor] | None"]
Sizes = dict[str, tuple[torch.dtype, int]]  # field -> dtype, number of elements


@dataclass(frozen=True)
class Quantization:
    """How a matrix is stored.

    Attributes:
        bits: 8, 4, 3 or 2; 16: plain weights, fp16 (or bf16 or fp32, as they are stored).
        group_size: Weights that share a scale and a zero.
        scale_group_size: Scales that share an 8-bit quantization of their own; None: fp16 scales.
        quantize_zero: Zeros in 8 bits with one scale and zero for the matrix; else fp16 zeros.
        split: 3 bits only: the two lower bits in W_q and the highest in W_high, 3 bits a weight. Else 10
            values in 32 bits as hqq packs them, groups of 64 padded to 70: 3.5 bits a weight.
    """

    bits: int
    group_size: int = 0
    scale_group_size: int | None = None
    quantize_zero: bool = False
    split: bool = False

    def __post_init__(self) -> None:
        if self.bits not in (16, 8, 4, 3, 2):
            raise OptionError("unknown bit width", expected="16, 8, 4, 3 or 2", found=self.bits)
        if self.split and (self.bits != 3 or self.group_size % 8):
            found = f"{self.bits} bits in groups of {self.group_size}"
            raise OptionError(
                "this cannot be split", expected="3 bits in groups of a multiple of 8", found=found
            )
        # smaller groups would not fill a word: larger than 16 bits, and ambiguous
        least = {16: 0, 8: 1, 4: 2, 3: 1, 2: 4}[self.bits]
        if self.group_size < least:
            raise OptionError("group size is too small", expected=f"{least} or more", found=self.group_size)
        if self.scale_group_size is not None and self.scale_group_size < 1:
            raise OptionError("scale group size must be positive", found=self.scale_group_size)

    def __str__(self) -> str:
        if self.bits == 16:
            return "16-bit"
        scale = (
            f"8-bit scales in groups of {self.scale_group_size}" if self.scale_group_size else "fp16 scales"
        )
        parts = " in two parts" if self.split else ""
        return f"{self.bits}-bit{parts}, group {self.group_size}, {scale}"


@dataclass(frozen=True)
class Part:
    """Some bits of every value, packed into separate words. A value is the sum of weight times part."""

    name: str
    bits: int
    weight: int = 1


def parts(quantization: Quantization) -> tuple[Part, ...]:
    """Return the parts of a packed matrix, the lowest bits first."""
    return (Part("W_q", 2), Part("W_high", 1, 4)) if quantization.split else (Part("W_q", quantization.bits),)


#: settings of the published checkpoint (2312.17238, section 4.2); 3 bits as in checkpoints of this package
PAPER = {
    2: Quantization(2, 16, 128, True),
    3: Quantization(3, 64, 128, True, split=True),
    4: Quantization(4, 64, 256, True),
    8: Quantization(8, 64),
    16: Quantization(16),
}


def field_specs(shape: tuple[int, int], quantization: Quantization) -> FieldSpecs:
    """Return names, dtypes and shapes of the tensors that hold a matrix of shape (N, K), in storage order."""
    n, k = shape
    if quantization.bits == 16:
        return {"weight": (torch.float16, (n, k))}
    group = quantization.group_size
    if (n * k) % group:
        raise OptionError(
            "group size does not divide the matrix", expected=f"a divisor of {n * k} = {n}x{k}", found=group
        )
    groups = n * k // group
    specs: FieldSpecs = {}
    for part in parts(quantization):
        per_word, word = WORDS[part.bits]
        specs[part.name] = word, (math.ceil(group / per_word), groups)
    scale_group = quantization.scale_group_size
    if scale_group is None:
        specs["meta.scale"] = (torch.float16, (1, groups))
    else:
        if groups % scale_group:
            raise OptionError(
                "scale group size does not divide the number of groups",
                expected=f"a divisor of {groups}",
                found=scale_group,
            )
        specs["meta.scale_q"] = (torch.uint8, (scale_group, groups // scale_group))
        specs["meta.meta_scale.scale"] = (torch.float16, (1, groups // scale_group))
        specs["meta.meta_scale.zero"] = (torch.float16, (1, groups // scale_group))
    if quantization.quantize_zero:
        specs["meta.zero_q"] = (torch.uint8, (1, groups))
        specs["meta.meta_zero.scale"] = (torch.float16, ())
        specs["meta.meta_zero.zero"] = (torch.float16, ())
    else:
        specs["meta.zero"] = (torch.float16, (1, groups))
    return specs


#: parts of a key that belong to a packed matrix
PACKED_MARKS = (".W_q", ".W_high", ".meta.")
#: (bits, group size) of published checkpoints. Counts of elements fit two of them for no matrix: the words of
#: a group (16 / 4, 64 / 2, 64 / 1; another dtype or another field for 3 bits) differ
PUBLISHED = frozenset((of.bits, of.group_size) for of in PAPER.values())


def split_quantized(key: str) -> tuple[str, str] | None:
    """Split the key of a packed tensor: `layer.meta.scale_q` -> (`layer`, `meta.scale_q`); else None."""
    for mark in PACKED_MARKS:
        if mark in key:
            module, _, rest = key.partition(mark)
            return module, (mark + rest).removeprefix(".")
    return None


def infer(
    shape: tuple[int, int], sizes: Sizes, path: Path | None = None, matrix: str | None = None
) -> Quantization:
    """Find the `Quantization` of a stored matrix from its fields' dtypes and element counts alone.

    With a wrong shape the answer may be wrong: 4-bit groups of 64 look like 2-bit groups of 128 of a matrix
    twice as large. So the result has to be compared with what the checkpoint states, or with `PUBLISHED`, as
    `manifest.recognise` does.

    Args:
        shape: (N, K).
        sizes: Field name -> (dtype, number of elements).
        path: The file, for errors.
        matrix: Its name, for errors.

    Raises:
        CheckpointError: If nothing fits.
    """
    prefix = f"{matrix}." if matrix else ""
    found = Quantization(16) if "weight" in sizes else _infer_packed(shape, sizes, path, prefix)
    expected = {name: (dtype, math.prod(dims)) for name, (dtype, dims) in field_specs(shape, found).items()}
    if sizes.get("weight", (None, 0))[0] in (torch.bfloat16, torch.float32):  # as good: products convert them
        expected["weight"] = (sizes["weight"][0], expected["weight"][1])
    for name in expected.keys() | sizes.keys():
        if name not in sizes or name not in expected or sizes[name] != expected[name]:
            raise CheckpointError(
                f"a matrix of {shape[0]}x{shape[1]} ({found}) has a tensor of the wrong kind",
                path=path,
                key=prefix + name,
                expected=_describe(expected.get(name)),
                found=_describe(sizes.get(name)),
            )
    return found


def _infer_packed(shape: tuple[int, int], sizes: Sizes, path: Path | None, prefix: str) -> Quantization:
    n_weights = shape[0] * shape[1]
    groups = next((sizes[name][1] for name in ("meta.zero_q", "meta.zero") if name in sizes), 0)
    if "W_q" not in sizes or groups == 0 or n_weights % groups:
        raise CheckpointError(
            f"not an HQQ matrix of {shape[0]}x{shape[1]}",
            path=path,
            key=f"{prefix}W_q and meta.*",
            expected=f"W_q, and a number of zeros that divides {n_weights}",
            found=", ".join(f"{name}: {_describe(size)}" for name, size in sizes.items()) or "nothing",
        )
    group = n_weights // groups
    words = {bits: (WORDS[bits][1], math.ceil(group / WORDS[bits][0]) * groups) for bits in (8, 4, 3, 2)}
    bits = next((bits for bits, size in words.items() if size == sizes["W_q"]), None)
    if bits is None:
        raise CheckpointError(
            f"W_q fits no bit width for a matrix of {shape[0]}x{shape[1]} in groups of {group}",
            path=path,
            key=f"{prefix}W_q",
            expected=" or ".join(f"{_describe(size)} ({bits}-bit)" for bits, size in words.items()),
            found=_describe(sizes["W_q"]),
        )
    meta = sizes.get("meta.meta_scale.scale")
    scale_group = groups // max(meta[1], 1) if meta else None
    split = bits == 2 and "W_high" in sizes and group % 8 == 0
    return Quantization(3 if split else bits, group, scale_group, "meta.zero_q" in sizes, split)


def _describe(size: tuple[torch.dtype, int] | None) -> str:
    return (
        "no such tensor" if size is None else f"{size[1]} elements of {str(size[0]).removeprefix('torch.')}"
    )


def dequantize(
    fields: Fields, shape: tuple[int, int], quantization: Quantization, dtype: torch.dtype = torch.float16
) -> Tensor:
    """Compute the matrix `[N, K]` in `dtype`. The arithmetic is fp16, bit-identical to hqq's."""
    if quantization.bits == 16:
        return fields["weight"].view(shape).to(dtype)
    q = values(fields, quantization, torch.float16)
    q -= zero_of(fields)
    q *= scale_of(fields)
    return q.view(shape).to(dtype)


def values(fields: Fields, quantization: Quantization, dtype: torch.dtype = torch.uint8) -> Tensor:
    """Unpack the integers `[group_size, G]`, from 0 to 2**bits - 1."""
    first, *rest = parts(quantization)
    q = unpack(fields[first.name], first.bits, quantization.group_size, torch.uint8 if rest else dtype)
    for part in rest:  # in bytes: half the memory of fp16, and faster
        q |= unpack(fields[part.name], part.bits, quantization.group_size).mul_(part.weight)
    return q.to(dtype)


def scale_of(fields: Fields) -> Tensor:
    """Return the scales, fp16 `[1, G]`."""
    if "meta.scale" in fields:
        return fields["meta.scale"]
    scale = fields["meta.scale_q"].half() - fields["meta.meta_scale.zero"]
    return (scale * fields["meta.meta_scale.scale"]).view(1, -1)


def zero_of(fields: Fields) -> Tensor:
    """Return the zeros, fp16 `[1, G]`."""
    if "meta.zero" in fields:
        return fields["meta.zero"]
    return (fields["meta.zero_q"].half() - fields["meta.meta_zero.zero"]) * fields["meta.meta_zero.scale"]


def matmul(x: Tensor, fields: Fields, shape: tuple[int, int], quantization: Quantization) -> Tensor:
    """Compute `x [T, K] @ W.T` -> `[T, N]` in x's dtype."""
    return F.linear(x, dequantize(fields, shape, quantization, x.dtype))


def quantize(weight: Tensor, quantization: Quantization) -> Fields:
    """Quantize `weight [N, K]` (any float dtype) with hqq's solver, on the weight's device."""
    n, k = weight.shape
    specs = field_specs((n, k), quantization)
    if quantization.bits == 16:
        return {"weight": weight.to(torch.float16).contiguous()}
    from hqq.core.quantize import Quantizer

    device = str(weight.device)
    q, meta = Quantizer.quantize(
        weight,
        nbits=quantization.bits,
        group_size=quantization.group_size,
        axis=0,
        bitpack=False,
        device=device,
    )
    fields = _packed(q.to(torch.uint8), quantization)
    if quantization.scale_group_size is None:
        fields["meta.scale"] = meta["scale"]
    else:
        # hqq's solver treats ranges below 1e-4 as constant: bring the scales near 1 first, exactly (a power
        # of two)
        factor = 2.0 ** -math.floor(math.log2(meta["scale"].abs().max().item()))
        fields["meta.scale_q"], m = Quantizer.quantize(
            meta["scale"] * factor,
            nbits=8,
            group_size=quantization.scale_group_size,
            axis=0,
            optimize=False,
            device=device,
        )
        fields["meta.meta_scale.scale"], fields["meta.meta_scale.zero"] = m["scale"] / factor, m["zero"]
    if quantization.quantize_zero:
        fields["meta.zero_q"], m = Quantizer.quantize(
            meta["zero"], nbits=8, channel_wise=False, group_size=None, axis=0, optimize=False, device=device
        )
        if not m["zero"].to(torch.float16).isfinite().all():
            fields["meta.zero_q"], m = _nearly_equal(meta["zero"])
        fields["meta.meta_zero.scale"], fields["meta.meta_zero.zero"] = m["scale"], m["zero"]
    else:
        fields["meta.zero"] = meta["zero"]
    return {name: fields[name].to(dtype).reshape(dims).contiguous() for name, (dtype, dims) in specs.items()}


def _nearly_equal(zeros: Tensor) -> tuple[Tensor, Fields]:
    """Quantize zeros whose range is so small that hqq's own zero overflows fp16: they all have one sign.

    Returns:
        Their bytes; scale and zero.
    """
    largest = zeros.abs().max().float()
    scale = (largest / 255).to(torch.float16)
    largest_byte = 255.0 if zeros.flatten()[0] < 0 else 0.0
    zero = torch.tensor(largest_byte, dtype=torch.float32, device=zeros.device)
    return (zeros.float() / scale.float() + zero).round().clamp(0, 255), {"scale": scale, "zero": zero}


def repack(fields: Fields, stored: Quantization, wanted: Quantization) -> Fields:
    """Convert fields to the layout of `wanted`, which differs from `stored` in `split` alone."""
    meta = {name: value for name, value in fields.items() if name.startswith("meta.")}
    return _packed(values(fields, stored), wanted) | meta


def _packed(q: Tensor, quantization: Quantization) -> Fields:
    return {
        part.name: pack((q // part.weight) & (2**part.bits - 1), part.bits) for part in parts(quantization)
    }


def check_replaceable(linear: torch.nn.Module, path: Path | None = None, name: str | None = None) -> None:
    """Raise a CheckpointError unless a `QuantizedLinear` can keep all that this module holds and does.

    Args:
        path: Where its weight is stored, for errors.
        name: The module's name, for errors.
    """
    if not isinstance(linear, torch.nn.Linear):
        raise CheckpointError(
            "a quantized matrix is not for a linear layer",
            path=path,
            key=name,
            expected="torch.nn.Linear",
            found=type(linear).__name__,
        )
    state = linear.__dict__.keys() - torch.nn.Linear(1, 1, device="meta").__dict__.keys()
    lost = [
        *(name for name in linear._parameters if name not in ("weight", "bias")),
        *linear._buffers,
        *linear._modules,
        *(name for name in state if not name.startswith("_")),
        *(
            name
            for name in ("_forward_hooks", "_forward_pre_hooks", "_parametrizations")
            if getattr(linear, name, None)
        ),
    ]
    if type(linear).forward is not torch.nn.Linear.forward:
        lost.append(f"the forward of {type(linear).__name__}")
    if lost:
        raise CheckpointError(
            "a linear layer has more than its quantized form can keep",
            path=path,
            key=name,
            expected="a weight and a bias",
            found=", ".join(lost),
            hint="convert the checkpoint again, with this layer in 16 bits",
        )


class QuantizedWeight:
    """Stands for the weight of a `QuantizedLinear`, which has no tensor: states its device, dtype and shape.

    Libraries that adapt linear layers (peft's LoRA) read these. Access to values is refused.
    """

    def __init__(self, layer: QuantizedLinear):
        device = next(iter(layer.fields.values())).device
        shape = torch.Size((layer.out_features, layer.in_features))
        vars(self).update(
            device=device, dtype=layer.dtype, shape=shape, requires_grad=False, is_meta=device.type == "meta"
        )

    def __setattr__(self, name: str, value: object) -> NoReturn:
        self.__torch_function__(name)

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__") or not hasattr(Tensor, name):  # tests for optional attributes go on
            raise AttributeError(name)
        self.__torch_function__(name)

    @classmethod
    def __torch_function__(cls, *args: Any, **kwargs: Any) -> NoReturn:
        raise OptionError(
            "this layer's weight is quantized: its values cannot be read or changed as a tensor",
            found=getattr(args[0], "__name__", args[0]) if args else None,
            hint="use an adapter that is not merged, or load the model with dequantize_on_load=True",
        )


class QuantizedLinear(torch.nn.Linear):
    """A linear layer whose weight stays quantized; buffers are named as in the checkpoint.

    It is a `torch.nn.Linear`, so that libraries that search for those find it (peft's LoRA). Its `weight` is
    no tensor, see `QuantizedWeight`.

    Args:
        shape: (N, K) of the weight.
        quantization: How it is stored.
        product: Product with a quantized matrix.
        bias: `[N]`, or None.
        dtype: What the layer computes with, reported as `weight.dtype`.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        quantization: Quantization,
        product: Linear = matmul,
        bias: torch.nn.Parameter | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        torch.nn.Module.__init__(self)  # not Linear's, which makes a weight
        self.out_features, self.in_features = shape
        self.quantization, self.product, self.dtype = quantization, product, dtype
        self._names = {name: name.replace(".", "__") for name in field_specs(shape, quantization)}
        # of a product that can be prepared: what it made, and the memory that this is valid for
        self._prepare: Prepare | None = getattr(product, "prepare", None)
        self._prepared: Callable[[Tensor], Tensor] | None = None
        self._prepared_for: list[Any] | None = None
        for name, (dtype, dims) in field_specs(shape, quantization).items():
            self.register_buffer(self._names[name], torch.empty(dims, dtype=dtype, device="meta"))
        self.register_parameter("bias", bias)

    @property  # type: ignore[override]  # torch declares a tensor; other access is refused
    def weight(self) -> QuantizedWeight:
        """No tensor; see `QuantizedWeight`."""
        return QuantizedWeight(self)

    @weight.setter
    def weight(self, value: object) -> NoReturn:
        self.weight.copy_()

    def requires_grad_(self, requires_grad: bool = True) -> QuantizedLinear:
        """Behave as torch's; refuse to train the weight."""
        if requires_grad:
            self.weight.requires_grad_()
        return super().requires_grad_(requires_grad)

    def dequantize(self) -> Tensor:
        """Compute the weight `[N, K]` in the layer's dtype. peft calls this if an adapter needs values."""
        shape = self.out_features, self.in_features
        return dequantize(self.fields, shape, self.quantization, self.dtype)

    def register_parameter(self, name: str, param: torch.nn.Parameter | None) -> None:
        """Behave as torch's; refuse a new weight."""
        if name == "weight":
            self.weight.copy_()
        super().register_parameter(name, param)

    def reset_parameters(self) -> NoReturn:
        """Refuse: there is no weight to fill with random values."""
        self.weight.uniform_()

    @classmethod
    def replacing(
        cls, linear: torch.nn.Linear, quantization: Quantization, product: Linear = matmul
    ) -> QuantizedLinear:
        """Make the replacement of a linear layer: all of it but the weight, which is still to be set.

        Raises:
            CheckpointError: If something of the layer would be lost.
        """
        check_replaceable(linear)
        shape = linear.out_features, linear.in_features
        layer = cls(shape, quantization, product, linear.bias, linear.weight.dtype)
        return layer.train(linear.training)

    def set_field(self, name: str, value: Tensor) -> None:
        """Put one stored tensor in place, reshaped to the shape expected."""
        buffer = self._names[name]
        setattr(self, buffer, value.view(getattr(self, buffer).shape))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        """Move the layer. `model.to(dtype)` converts only the bias: other scales are other weights."""
        stored = self.fields
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.weight.device)).dtype
        super()._apply(fn, recurse)
        for name, value in stored.items():
            moved = getattr(self, self._names[name])
            if moved.dtype != value.dtype:
                setattr(self, self._names[name], value.to(moved.device))
        return self

    @property
    def fields(self) -> Fields:
        """The stored tensors, by their names in a checkpoint."""
        return {name: getattr(self, buffer) for name, buffer in self._names.items()}

    def multiply(self, x: Tensor) -> Tensor:
        """Compute `x [..., K] @ W.T` -> `[..., N]`, without the bias."""
        shape = self.out_features, self.in_features
        if self._prepare is not None:
            buffers: dict[str, Any] = self._buffers
            stored = [buffers[name] for name in self._names.values()]
            memory = [
                (value.data_ptr(), value.dtype, value.numel()) if value.is_contiguous() else None
                for value in stored
            ]
            if memory != self._prepared_for:  # layers are filled, moved and loaded after they are made
                self._prepared = self._prepare(self.fields, shape, self.quantization)
                self._prepared_for = memory
            if self._prepared is not None:
                return self._prepared(x)
        rows = x.reshape(-1, self.in_features)
        return self.product(rows, self.fields, shape, self.quantization).view(*x.shape[:-1], shape[0])

    @torch.compiler.disable  # or a compiled model would round differently from an eager one
    def forward(self, x: Tensor) -> Tensor:
        needs_grad = torch.is_grad_enabled() and x.requires_grad
        y = _FrozenProduct.apply(x, self) if needs_grad else self.multiply(x)
        bias = self._parameters["bias"]
        return y if bias is None else y + bias

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, {self.quantization}, bias={self.bias is not None}"


def refuse_second_order() -> None:
    """Raise OptionError if backward has to build a graph of its own, which would lack what is computed here.

    torch's `once_differentiable` does not notice if only some gradients are requested: they would be silently
    wrong.
    """
    if torch.is_grad_enabled():
        raise OptionError(
            "second-order gradients need the experts' weights as parameters of the model",
            found="create_graph=True",
            hint="from_pretrained(..., dequantize_on_load=True) has them, if all of them fit on the device",
        )


class _FrozenProduct(torch.autograd.Function):
    """`QuantizedLinear.multiply` for autograd. Backward dequantizes the matrix again, to save memory."""

    @staticmethod
    def forward(x: Tensor, layer: QuantizedLinear) -> Tensor:
        return layer.multiply(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, QuantizedLinear], output: Tensor) -> None:
        _, ctx.layer = inputs

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None]:
        refuse_second_order()
        layer = ctx.layer
        shape = layer.out_features, layer.in_features
        return grad_y @ dequantize(layer.fields, shape, layer.quantization, grad_y.dtype), None
