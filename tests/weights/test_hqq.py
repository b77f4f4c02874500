"""Packing and dequantizing against hqq's own code, which is the naive twin here."""

import pytest
import torch
from hqq.core.bitpack import BitPack
from hqq.core.quantize import Quantizer
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mixtral_offload.errors import CheckpointError, OptionError
from mixtral_offload.weights.bitpack import WORDS, pack, unpack
from mixtral_offload.weights.hqq import (
    PAPER,
    Quantization,
    QuantizedLinear,
    dequantize,
    field_specs,
    infer,
    matmul,
    quantize,
)

HQQ_PACK = {
    8: BitPack.pack_8bit_u8,
    4: BitPack.pack_4bit_u8,
    3: BitPack.pack_3bit_32,
    2: BitPack.pack_2bit_u8,
    1: BitPack.pack_1bit_u8,
}


def hqq_dequantize(fields, shape, quantization):
    """hqq dequantizes scale and zero first where they are quantized themselves, then the matrix."""

    def inner(name, n):
        if f"meta.{name}" in fields:
            return fields[f"meta.{name}"]
        meta = {f: fields[f"meta.meta_{name}.{f}"] for f in ("scale", "zero")}
        meta |= {"packing": "8bit_u8", "view_as_float": False, "nbits": 8, "shape": (1, n), "axis": 0}
        return Quantizer.dequantize(fields[f"meta.{name}_q"], meta)

    bits, group = quantization.bits, quantization.group_size
    n_groups = shape[0] * shape[1] // group
    meta = {
        "nbits": bits,
        "group_size": group,
        "shape": shape,
        "axis": 0,
        "packing": Quantizer.bit_to_packing[bits],
        "view_as_float": False,
        "scale": inner("scale", n_groups),
        "zero": inner("zero", n_groups),
    }
    return Quantizer.dequantize(fields["W_q"], meta)


@given(
    bits=st.sampled_from([8, 4, 3, 2, 1]),
    rows=st.integers(1, 70),
    columns=st.integers(1, 9),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=300, deadline=None)
def test_pack_then_unpack_is_the_identity(bits, rows, columns, seed):
    q = torch.randint(
        0, 2**bits, (rows, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    packed = pack(q, bits)
    assert packed.dtype == WORDS[bits][1] and packed.shape[0] == -(-rows // WORDS[bits][0])
    assert torch.equal(unpack(packed, bits, rows), q)


@given(
    bits=st.sampled_from([8, 4, 3, 2, 1]),
    words=st.integers(1, 20),
    columns=st.integers(1, 9),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=200, deadline=None)
def test_packed_bytes_are_hqqs(bits, words, columns, seed):
    rows = words * (1 if bits == 3 else WORDS[bits][0])  # hqq pads rows only at 3 bits
    q = torch.randint(
        0, 2**bits, (rows, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    assert torch.equal(pack(q, bits), HQQ_PACK[bits](q))


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("meta", [(None, False), (32, True), (None, True), (16, False)])
def test_dequantize_is_bit_identical_to_hqq(bits, meta):
    quantization = Quantization(bits, 16, *meta)
    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(bits)) * 0.02
    fields = quantize(weight, quantization)
    ours = dequantize(fields, (96, 64), quantization)
    assert ours.dtype == torch.float16
    assert torch.equal(ours, hqq_dequantize(fields, (96, 64), quantization))


@given(
    bits=st.sampled_from([8, 4, 3, 2]),
    n=st.integers(1, 12),
    k=st.integers(1, 12),
    group=st.integers(1, 24),
    meta=st.sampled_from([(None, False), (1, True), (3, False)]),
    seed=st.integers(0, 1000),
)
@example(bits=8, n=1, k=6, group=24, meta=(1, True), seed=1)  # two zeros that are nearly equal
@settings(max_examples=200, deadline=None)
def test_any_group_size_that_divides_works_and_others_are_refused(bits, n, k, group, meta, seed):
    if group < {4: 2, 2: 4}.get(bits, 1):
        with pytest.raises(OptionError, match="too small"):
            Quantization(bits, group, *meta)
        return
    quantization = Quantization(bits, group, *meta)
    n_weights = n * k * 8
    scale_group = quantization.scale_group_size or 1
    if n_weights % group or (n_weights // group) % scale_group:
        with pytest.raises(OptionError, match="does not divide"):
            field_specs((n * 8, k), quantization)
        return
    weight = torch.randn(n * 8, k, generator=torch.Generator().manual_seed(seed))
    fields = quantize(weight, quantization)
    assert (
        infer((n * 8, k), {name: (value.dtype, value.numel()) for name, value in fields.items()})
        == quantization
    )
    assert dequantize(fields, (n * 8, k), quantization).isfinite().all()


@pytest.mark.parametrize("at", [0.5, -0.5, 3.0])
def test_zeros_that_are_all_alike(at):
    """One group, or equal groups, far from 0: their range is too small to quantize them in."""
    weight = torch.linspace(at, at + 0.1, 64).repeat(4, 1)
    plain, packed = Quantization(8, 64), Quantization(8, 64, None, True)
    found, expected = (dequantize(quantize(weight, of), (4, 64), of, torch.float32) for of in (packed, plain))
    assert (found - weight).abs().max() < (expected - weight).abs().max() + 0.002 * abs(at)


#: relative errors of a Gaussian matrix; the widths must keep their order and stay near what hqq gives
@pytest.mark.parametrize("bits, bound", [(16, 5e-4), (8, 0.02), (4, 0.11), (3, 0.21), (2, 0.33)])
def test_quantization_error(bits, bound):
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(1)) * 0.02
    fields = quantize(weight, PAPER[bits])
    error = (dequantize(fields, (256, 512), PAPER[bits], torch.float32) - weight).norm() / weight.norm()
    assert error < bound


def test_small_scales_survive_their_own_quantization():
    """hqq's solver takes a range below 1e-4 for a constant; at 4 bits, all scales of small weights are."""
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(1)) * 1e-4
    errors = []
    for quantization in (Quantization(4, 64), Quantization(4, 64, 128)):
        restored = dequantize(quantize(weight, quantization), (256, 512), quantization, torch.float32)
        errors.append((restored - weight).norm() / weight.norm())
    assert errors[1] < 1.3 * errors[0]


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_quantized_linear_is_the_dequantized_product(bits):
    weight, x = torch.randn(64, 128) * 0.05, torch.randn(2, 5, 128)
    fields = quantize(weight, PAPER[bits] if bits != 4 else Quantization(4, 64))
    quantization = infer((64, 128), {name: (value.dtype, value.numel()) for name, value in fields.items()})
    layer = QuantizedLinear((64, 128), quantization)
    for name, value in fields.items():
        layer.set_field(name, value.reshape(-1))  # published tensors may differ in rank
    w = dequantize(fields, (64, 128), quantization, torch.float32)
    assert torch.equal(layer(x), torch.nn.functional.linear(x.view(10, 128), w).view(2, 5, 64))
    assert torch.equal(layer(x).view(10, 64), matmul(x.view(10, 128), fields, (64, 128), quantization))


def test_infer_names_what_is_wrong():
    fields = quantize(torch.randn(64, 64), Quantization(4, 16))
    sizes = {name: (value.dtype, value.numel()) for name, value in fields.items()}
    with pytest.raises(CheckpointError, match=r"(?s)meta\.scale.*float16.*float32"):
        infer((64, 64), sizes | {"meta.scale": (torch.float32, sizes["meta.scale"][1])})
    with pytest.raises(CheckpointError, match="fits no bit width"):
        infer((64, 64), sizes | {"W_q": (torch.uint8, 5)})
    with pytest.raises(CheckpointError, match="not an HQQ matrix"):
        infer((64, 64), {"W_q": sizes["W_q"]})
    with pytest.raises(OptionError, match="bit width"):
        Quantization(5, 16)


@pytest.mark.parametrize("meta", [(None, False), (128, True)])
@pytest.mark.parametrize("group", [8, 24, 64])
def test_split_three_bits_are_the_same_weights_in_fewer_bytes(group, meta):
    shape, words = (192, 128), Quantization(3, group, *meta)
    split = Quantization(3, group, *meta, split=True)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(group)) * 0.02
    old, new = quantize(weight, words), quantize(weight, split)
    assert torch.equal(dequantize(old, shape, words), dequantize(new, shape, split))
    sizes = {name: (value.dtype, value.numel()) for name, value in new.items()}
    assert infer(shape, sizes) == split and new["W_q"].nbytes + new["W_high"].nbytes == weight.numel() * 3 / 8
    assert (
        old["W_q"].nbytes * 8 == weight.numel() * 32 * -(-group // 10) / group
    )  # ten in 32 bits, groups padded
    with pytest.raises(CheckpointError):
        infer(shape, {name: size for name, size in sizes.items() if name != "W_q"})
    for wrong in ((3, 12), (4, 16)):
        with pytest.raises(OptionError, match="cannot be split"):
            Quantization(*wrong, split=True)


def test_gradients_through_a_quantized_layer_with_a_bias():
    """Also if the product itself has none, as compiled ones, and after the layer's memory was refilled."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 32)
    quantization = Quantization(4, 16)
    layer = QuantizedLinear.replacing(linear, quantization, torch.no_grad()(matmul))
    fields = quantize(linear.weight.detach(), quantization)
    for name, value in fields.items():
        layer.set_field(name, value)
    weight = dequantize(fields, (32, 64), quantization, torch.float32)
    x, upstream = torch.randn(3, 5, 64, requires_grad=True), torch.randn(3, 5, 32)
    (expected,) = torch.autograd.grad(torch.nn.functional.linear(x, weight, linear.bias), x, upstream)
    (found,) = torch.autograd.grad(layer(x), x, upstream)
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_dtype_of_the_model_leaves_stored_weights_alone(dtype):
    torch.manual_seed(0)
    linear, quantization = torch.nn.Linear(64, 32), Quantization(4, 16, 32, True)
    layer = QuantizedLinear.replacing(linear, quantization)
    fields = quantize(linear.weight.detach(), quantization)
    for name, value in fields.items():
        layer.set_field(name, value)
    layer.to(dtype)
    assert layer.bias.dtype == dtype
    assert all(
        torch.equal(layer.fields[name], value.view(layer.fields[name].shape))
        for name, value in fields.items()
    )
    assert layer(torch.randn(2, 64, dtype=dtype)).dtype == dtype


def test_a_quantized_layer_is_a_linear_one_without_a_tensor():
    """Libraries that add adapters to linear layers find it; access to its weight is refused."""
    linear = torch.nn.Linear(64, 32, dtype=torch.bfloat16)
    layer = QuantizedLinear.replacing(linear, Quantization(4, 16))
    assert isinstance(layer, torch.nn.Linear) and layer.weight.shape == (32, 64)
    assert (layer.weight.dtype, layer.weight.device.type) == (torch.bfloat16, "meta")
    for name, value in quantize(linear.weight.detach().float(), Quantization(4, 16)).items():
        layer.set_field(name, value)
    layer.half()
    assert (layer.weight.dtype, layer.weight.device.type) == (torch.float16, "cpu")
    assert {*dict(layer.named_parameters())} == {"bias"} and "weight" not in layer.state_dict()
    assert not hasattr(layer.weight, "quant_state")
    assert torch.equal(layer.dequantize(), dequantize(layer.fields, (32, 64), Quantization(4, 16)).half())
    layer.requires_grad_(False)
    x = torch.zeros(1, 64)
    for use in (
        lambda: layer.weight.data,
        lambda: layer.weight.T,
        lambda: layer.weight.sum(),
        lambda: torch.nn.init.normal_(layer.weight),
        lambda: torch.nn.functional.linear(x, layer.weight),
        lambda: x @ layer.weight,
        lambda: layer.reset_parameters(),
        lambda: layer.requires_grad_(),
        lambda: setattr(layer, "weight", x),
        lambda: setattr(layer.weight, "data", x),
        lambda: setattr(layer.weight, "requires_grad", True),
        lambda: layer.weight.copy_(x),
        lambda: setattr(layer, "weight", torch.nn.Parameter(x)),
        lambda: torch.allclose(layer.weight, x),
    ):
        with pytest.raises(OptionError, match="weight is quantized"):
            use()
