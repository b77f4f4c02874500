"""RMS norms by the kernels: those that compute what transformers' modules do, and no others."""

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.mixtral.modeling_mixtral import MixtralRMSNorm
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated

from mixtral_offload.models.norms import MOST_NUMBERS, ByKernels, replace_norms
from mixtral_offload.weights.native import find_native
from tests.twin import relative_error

NATIVE = find_native()[0]
pytestmark = pytest.mark.skipif(NATIVE is None, reason="no kernels")


class DoublingRMSNorm(MixtralRMSNorm):
    def forward(self, x):
        return 2 * super().forward(x)


class OtherEpsRMSNorm(MixtralRMSNorm):
    def __init__(self, n):
        super().__init__(n, eps=0.0)

    def forward(self, x):
        return MixtralRMSNorm.forward(self, x) if x.abs().max() > 1 else x


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
        assert torch.equal(norm(torch.zeros(2, n)), torch.zeros(2, n))
        norm.weight.data = norm.weight.data.clone().mul_(3)  # another memory
        assert relative_error(norm(x), kind.forward(norm, x)) < 1e-6
        setattr(norm, "eps" if hasattr(norm, "eps") else "variance_epsilon", 2.0)
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


@torch.no_grad()
def test_no_weight_and_no_input_is_read_out_of_bounds():
    norm = MixtralRMSNorm(64)
    replace_norms(nn.ModuleList([norm]), NATIVE)
    x = torch.randn(4, 64)
    for weight in (torch.tensor([2.0]).expand(64), torch.randn(64, 2)[:, 0], torch.randn(1)):
        found = torch.func.functional_call(norm, {"weight": weight}, (x,))
        other = copy.deepcopy(norm)
        other.weight = nn.Parameter(weight.clone())
        assert relative_error(found, MixtralRMSNorm.forward(other, x)) < 1e-6
    assert norm(torch.randn(2, 1)).shape == (2, 64)  # broadcast, as transformers does it
    with pytest.raises(RuntimeError, match="must match"):
        norm(torch.randn(4, 32))
    assert torch.equal(norm(hidden_states=x), MixtralRMSNorm.forward(norm, x))
    assert norm(x.to("meta")).is_meta if norm.to("meta") is norm else False


def test_copies_are_transformers_own():
    norm = MixtralRMSNorm(64)
    replace_norms(nn.ModuleList([norm]), NATIVE)
    assert isinstance(norm, ByKernels) and repr(norm) == repr(MixtralRMSNorm(64))
    for other in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        assert type(other) is MixtralRMSNorm
        with torch.no_grad():
            other.weight.mul_(2)
            x = torch.randn(1, 64)
            assert relative_error(other(x), 2 * norm(x)) < 1e-6


@pytest.mark.parametrize(
    "other",
    [
        nn.LayerNorm(64),
        DoublingRMSNorm(64),
        OtherEpsRMSNorm(64),
        nn.RMSNorm(64),
        Qwen3NextRMSNormGated(64),
        MixtralRMSNorm(64).to(torch.bfloat16),
        nn.RMSNorm((4, 16)),
    ],
    ids=lambda of: type(of).__name__,
)
def test_what_computes_something_else_is_not_replaced(other):
    own = type(other)
    assert replace_norms(nn.ModuleList([other]), NATIVE) == 0
    assert type(other) is own


def test_a_model_has_them(offloaded):
    norms = [of for of in offloaded(cache_size=8).modules() if isinstance(of, MixtralRMSNorm)]
    assert len(norms) == 13 and all(isinstance(of, ByKernels) for of in norms)
