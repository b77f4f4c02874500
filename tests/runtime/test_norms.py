"""RMS norms by the kernels: those that compute what transformers' modules do, and no others."""

import gc
import weakref

import pytest
import torch
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.mixtral.modeling_mixtral import MixtralRMSNorm
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated

from mixtral_offload.runtime.norms import MOST_NUMBERS, replace_norms
from mixtral_offload.weights.native import find_native
from tests.twin import relative_error

NATIVE = find_native()[0]
pytestmark = pytest.mark.skipif(NATIVE is None, reason="no kernels")


class DoublingRMSNorm(MixtralRMSNorm):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("kind", [MixtralRMSNorm, Gemma3RMSNorm])
@pytest.mark.parametrize("n", [1, 7, 192, 1000])
def test_a_norm_is_transformers_own(kind, n):
    norm = kind(n, eps=1e-3)
    nn.init.normal_(norm.weight)
    holder = nn.ModuleList([norm])
    assert replace_norms(holder, NATIVE) == 1
    assert replace_norms(holder, NATIVE) == 0  # not twice
    with torch.no_grad():
        for shape in ((1, 1, n), (2, 5, n), (n,)):
            x = 5 * torch.randn(shape)
            assert relative_error(norm(x), kind.forward(norm, x)) < 1e-6
            assert norm(x).shape == x.shape
        x = torch.randn(4, 2 * n)[:, ::2]
        assert relative_error(norm(x), kind.forward(norm, x)) < 1e-6
        assert norm(torch.full((1, n), torch.nan)).isnan().all()
        norm.weight.data = norm.weight.data.clone().mul_(3)  # another memory
        assert relative_error(norm(x), kind.forward(norm, x)) < 1e-6


def test_the_rest_is_left_to_transformers():
    norm = MixtralRMSNorm(64)
    replace_norms(nn.ModuleList([norm]), NATIVE)
    many = torch.randn(MOST_NUMBERS // 64 + 1, 64)
    with torch.no_grad():
        assert torch.equal(norm(many), MixtralRMSNorm.forward(norm, many))
        for dtype in (torch.bfloat16, torch.float16):
            x = torch.randn(2, 64, dtype=dtype)
            assert torch.equal(norm(x), MixtralRMSNorm.forward(norm, x))
            assert norm(x).dtype == MixtralRMSNorm.forward(norm, x).dtype
    x = torch.randn(2, 64, requires_grad=True)
    norm(x).sum().backward()
    assert x.grad is not None and norm.weight.grad is not None


@pytest.mark.parametrize(
    "other",
    [
        nn.LayerNorm(64),
        DoublingRMSNorm(64),
        Qwen3NextRMSNormGated(64),
        MixtralRMSNorm(64).to(torch.bfloat16),
        nn.RMSNorm((4, 16)),
    ],
    ids=lambda of: type(of).__name__,
)
def test_what_computes_something_else_is_not_replaced(other):
    assert replace_norms(nn.ModuleList([other]), NATIVE) == 0
    assert "forward" not in vars(other)


def test_a_model_has_them(offloaded):
    model = offloaded(cache_size=8)
    norms = [of for of in model.modules() if isinstance(of, MixtralRMSNorm)]
    assert len(norms) == 13 and all("forward" in vars(of) for of in norms)
    gone = weakref.ref(norms[0])
    gc.disable()
    try:
        offloaded_norm = MixtralRMSNorm(8)
        replace_norms(nn.ModuleList([offloaded_norm]), NATIVE)
        gone = weakref.ref(offloaded_norm)
        del offloaded_norm
        assert gone() is None  # no cycle keeps it
    finally:
        gc.enable()
