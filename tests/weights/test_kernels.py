"""Products from packed words agree with dequantizing first, for every width and layout, compiled and not."""

import pytest
import torch

from mixtral_offload import from_pretrained
from mixtral_offload.apps.cli import main
from mixtral_offload.errors import OptionError
from mixtral_offload.weights import kernels as packed
from mixtral_offload.weights.hqq import PAPER, Quantization, dequantize, matmul, quantize
from mixtral_offload.weights.layout import ExpertLayout, expert_forward
from mixtral_offload.weights.products import Kind

FORMATS = [
    PAPER[2],
    PAPER[3],
    Quantization(3, 64, 128, True),
    Quantization(3, 64),
    Quantization(3, 16, None, True),
    PAPER[4],
    Quantization(3, 16, split=True),
    Quantization(3, 8, 64, split=True),
    PAPER[8],
    Quantization(2, 16),
    Quantization(4, 64),
    Quantization(4, 32, 128, True),
    Quantization(8, 32, 64),
]
SHAPES = [(256, 512), (512, 192), (128, 640)]


def fields_of(shape, quantization, seed=0):
    torch.manual_seed(seed)
    return quantize(torch.randn(shape) / shape[1] ** 0.5, quantization)


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("quantization", FORMATS, ids=str)
def test_the_packed_product_is_that_of_the_dequantized_matrix(quantization, shape):
    fields = fields_of(shape, quantization)
    x = torch.randn(1, shape[1])
    expected = x @ dequantize(fields, shape, quantization, torch.float32).T
    assert (
        relative(packed.packed_product(x, fields, shape, quantization), expected) < 1e-3
    )  # fp16 rounds each weight


@pytest.mark.parametrize("quantization", FORMATS, ids=str)
def test_planes_are_the_rows_of_the_dequantized_matrix(quantization):
    shape = (256, 512)
    fields = fields_of(shape, quantization)
    group, steps = quantization.group_size, packed.n_steps(quantization)
    rows = dequantize(fields, shape, quantization, torch.float32).view(group, -1, shape[1])
    for step in range(steps):
        words = packed.step_words(fields, quantization, step)
        found = packed.planes(words, fields, shape, quantization, torch.float32)
        for row, plane in zip(range(step, group, steps), found):
            torch.testing.assert_close(plane, rows[row], rtol=2e-3, atol=2e-3 * rows.abs().max().item())


def layout_of(quantization, hidden=192, intermediate=384):
    shapes = {"gate": (intermediate, hidden), "up": (intermediate, hidden), "down": (hidden, intermediate)}
    fields = {
        matrix: fields_of(shape, quantization, seed) for seed, (matrix, shape) in enumerate(shapes.items())
    }
    sizes = {
        (m, name): (value.dtype, value.numel()) for m, of in fields.items() for name, value in of.items()
    }
    return ExpertLayout.build(hidden, intermediate, sizes), fields


def gated(x):
    gate, up = x.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


@pytest.mark.parametrize("quantization", [PAPER[2], PAPER[3], Quantization(3, 64), PAPER[16]], ids=str)
def test_a_compiled_expert_is_its_plain_twin(quantization):
    """One token, a few, and enough to dequantize; a token's result does not depend on the others."""
    layout, views = layout_of(quantization)
    run = packed.make_run(layout, gated, True)
    x = torch.randn(packed.PACKED_TOKENS + 3, 192)
    with torch.no_grad():
        for n in (1, 3, packed.PACKED_TOKENS, len(x)):
            found, expected = run(x[:n], views), expert_forward(x[:n], views, layout, gated)
            assert (
                found.dtype == x.dtype and relative(found, expected) < 2e-3
            )  # of three products, rounded in fp16 there
        assert torch.equal(run(x[:3], views)[1:2], run(x[1:2], views))


@pytest.mark.parametrize("quantization", [PAPER[4], PAPER[8]], ids=str)
def test_the_compiled_linear_is_its_plain_twin(quantization):
    shape = (256, 512)
    fields, x = fields_of(shape, quantization), torch.randn(packed.PACKED_TOKENS + 1, shape[1])
    with torch.no_grad():
        for n in (1, 2, len(x)):
            found = packed.linear(x[:n], fields, shape, quantization)
            assert relative(found, matmul(x[:n], fields, shape, quantization)) < 1e-3


def test_groups_that_cross_rows_are_dequantized():
    shape, quantization = (24, 32), Quantization(4, 64)
    fields, x = fields_of(shape, quantization), torch.randn(2, 32)
    assert torch.equal(packed.linear(x, fields, shape, quantization), matmul(x, fields, shape, quantization))


def test_when_to_compile(monkeypatch):
    small, cpu = layout_of(Quantization(4, 64))[0], torch.device("cpu")
    assert packed.choose(False, small, cpu) == (False, "as asked")
    assert not packed.choose("auto", small, cpu)[0]
    monkeypatch.setattr(packed, "WORTH_COMPILING_BYTES", 1)
    assert packed.choose("auto", small, cpu)[0] and packed.choose(True, small, cpu)[0]
    monkeypatch.setenv("CXX", "no-such-compiler")
    chosen, why = packed.choose("auto", small, cpu)
    assert not chosen and "no-such-compiler" in why
    with pytest.raises(OptionError, match="no-such-compiler"):
        packed.choose(True, small, cpu)


def test_a_compiled_model_answers_alike_at_every_cache_size(capsys):
    """Bit for bit, for a prompt and token by token; nearly equal to the uncompiled one, also as a command."""
    ids = torch.arange(5, 37).view(1, -1)
    found, plain = [], from_pretrained(cache_size=8)
    for options in ({"cache_size": 2, "store": "disk"}, {"cache_size": 3, "prefetch": 2}, {"cache_size": 8}):
        model = from_pretrained(compile=True, **options)
        assert model.offload.computation.products.kind is Kind.COMPILED and model.offload.compile_s > 0
        with torch.no_grad():
            out = model.generate(
                ids, max_new_tokens=12, do_sample=False, return_dict_in_generate=True, output_logits=True
            )
            found.append((model(ids).logits, out.sequences, torch.stack(out.logits)))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))
    with torch.no_grad():
        assert relative(found[0][0], plain(ids).logits) < 5e-3
    words = ["generate", "What is the capital of France?", "--cache-size", "2"]
    assert main([*words, "--compile"]) == 0
    compiled = capsys.readouterr()
    assert main(words) == 0
    assert compiled.out == capsys.readouterr().out and "--no-compile does without" in compiled.err
