"""What the compiled products become on a T4: Triton kernels that compile for sm_75, without `tl.dot`."""

import os

import pytest
import torch

from mixtral_offload.weights import kernels as packed
from mixtral_offload.weights.hqq import PAPER, Quantization, field_specs

if not os.environ.get("REQUIRE_TRITON"):
    pytest.importorskip("triton")
SHAPE = (14336, 4096)
KINDS = [PAPER[2], PAPER[3], PAPER[4], PAPER[8], Quantization(3, 64, 128, True), Quantization(4, 64)]


def kernels(function, quantization, x=None):
    from tests.sm75 import triton_kernels

    specs = field_specs(SHAPE, quantization)
    first = [] if x is None else [x]
    return triton_kernels(
        lambda *tensors: function(tensors[: len(first)], dict(zip(specs, tensors[len(first) :]))),
        *first,
        *specs.values(),
    )


def check(found):
    from tests.sm75 import compile_for_t4

    for source in found.values():
        assert "tl.dot" not in source
        machine_code, assembly = compile_for_t4(source)
        assert len(machine_code) > 1000 and ".target sm_75" in assembly


@pytest.mark.parametrize("quantization", KINDS, ids=str)
def test_the_packed_product_compiles_for_a_t4_as_one_pass_over_the_words(quantization):
    found = kernels(
        lambda x, fields: [packed.packed_product(x[0], fields, SHAPE, quantization)],
        quantization,
        (torch.float16, (1, SHAPE[1])),
    )
    check(found)
    # all sums over words are in one kernel; two more may sum the zeros and join what comes of both
    assert len(found) <= 3 and sum(source.count("tl.sum(") > 1 for source in found.values()) == 1


@pytest.mark.parametrize("quantization", KINDS, ids=str)
def test_planes_compile_for_a_t4(quantization):
    found = kernels(
        lambda _, fields: packed.planes(
            packed.step_words(fields, quantization, 0), fields, SHAPE, quantization, torch.float16
        ),
        quantization,
    )
    check(found)
