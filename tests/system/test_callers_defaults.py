"""torch's default dtype and device belong to the caller; transformers changes them while it builds models.

They hold for all threads. No answer may depend on them, and no buffer that the kernels write: one of another
dtype ends earlier.
"""

import functools
import json
import subprocess
import sys
import threading
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import nn

from mixtral_offload import from_pretrained
from mixtral_offload.models.norms import ByKernels, replace_norms
from mixtral_offload.weights.hqq import PAPER, QuantizedLinear, quantize
from mixtral_offload.weights.native import NativeLinear, find_native

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@functools.cache
def answers(dtype: str, device: str) -> dict:
    command = [sys.executable, "-W", "ignore", "-m", "tests.system.callers_defaults", dtype, device]
    ended = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-2000:]
    return json.loads(ended.stdout)


@pytest.mark.parametrize("dtype, device", [("float16", "cpu"), ("float64", "cpu"), ("bfloat16", "meta")])
def test_answers_do_not_depend_on_the_defaults(dtype, device):
    expected = answers("float32", "cpu")
    assert expected["chat"] == "2 + 3 = 5." and len(expected) >= 12
    assert answers(dtype, device) == expected


@pytest.fixture
def defaults():
    before = torch.get_default_dtype()
    yield
    torch.set_default_dtype(before)


def kernels():
    native, why = find_native()
    if native is None:
        pytest.skip(why)
    return native


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_buffers_of_the_kernels(dtype, defaults):
    native = kernels()
    y, weights = torch.randn(7, 2, 40), torch.rand(7, 2)
    x, norm = torch.randn(3, 64), nn.RMSNorm(64, eps=1e-5)
    expected = native.weighted_sums(y, weights)
    torch.set_default_dtype(dtype)
    assert torch.equal(native.weighted_sums(y, weights), expected)
    assert native.weighted_sums(y[:, :0], weights[:, :0]).dtype == torch.float32
    replace_norms(norm, native)
    assert isinstance(norm, ByKernels)
    with torch.no_grad():
        assert torch.equal(norm(x), native.rms_norm(x, norm.weight, 1e-5, 0.0))


def test_memory_that_the_kernels_may_not_touch():
    native, y, weights = kernels(), torch.randn(4, 2, 16), torch.rand(4, 2)
    x, weight = torch.randn(3, 8), torch.ones(8)
    for wrong in (y.half(), y.double(), y.to("meta")):
        with pytest.raises(RuntimeError, match="contiguous float32"):
            native.weighted_sums(wrong, weights)
    for wrong in (weights[:, :1], weights[:3], weights.t()):
        with pytest.raises(RuntimeError, match="expected"):
            native.weighted_sums(y, wrong)
    for wrong in (weight.half(), torch.ones(16)[::2]):
        with pytest.raises(RuntimeError, match="contiguous float32"):
            native.rms_norm(x, wrong, 1e-5, 0.0)
    with pytest.raises(RuntimeError, match="8 columns, expected 7"):
        native.rms_norm(x, torch.ones(7), 1e-5, 0.0)
    model = from_pretrained(device="cpu", cache_size=8)
    experts, hidden = model.offload.computation.experts, model.config.hidden_size
    address = model.offload.cache.memory[0].data_ptr()
    for n, columns, counts in ((1, hidden + 1, None), (2, hidden, None), (2, hidden, [3])):
        with pytest.raises(RuntimeError, match="expected"):
            experts.run(torch.zeros(n, columns), [address], counts)
    with pytest.raises(RuntimeError, match="expected"):
        experts.run_token(torch.zeros(1, hidden), [address], torch.ones(1, 2))


def test_models_built_while_others_answer(defaults):
    """In two dtypes at once: the same bits, also of a model that answers meanwhile."""
    ids, problems = torch.tensor([[300, 700, 900]]), []
    model = from_pretrained(device="cpu", cache_size=2)
    with torch.no_grad():
        expected = model(ids).logits, model(ids[:, :1]).logits
    wanted = {of: from_pretrained(device="cpu", cache_size=2, dtype=of) for of in DTYPES[:3:2]}
    with torch.no_grad():
        results = {of: built(ids).logits for of, built in wanted.items()}
    built = threading.Event()

    def build(dtype):
        try:
            for _ in range(4):
                with torch.no_grad():
                    found = from_pretrained(device="cpu", cache_size=2, dtype=dtype)(ids).logits
                if not torch.equal(found, results[dtype]):
                    problems.append(f"another answer of a model in {dtype}")
        except Exception as error:
            problems.append(repr(error))

    def answer():
        with torch.no_grad():
            while not built.is_set():
                if not all(map(torch.equal, (model(ids).logits, model(ids[:, :1]).logits), expected)):
                    problems.append("another answer while models were built")

    builders = [threading.Thread(target=build, args=(dtype,)) for dtype, _ in product(results, range(2))]
    reader = threading.Thread(target=answer)
    for thread in (reader, *builders):
        thread.start()
    for thread in builders:
        thread.join(300)
    built.set()
    reader.join(60)
    assert not problems, set(problems)
    assert torch.get_default_dtype() == torch.float32


def layer_of_128() -> QuantizedLinear:
    layer = QuantizedLinear((128, 128), PAPER[4], NativeLinear(kernels()))
    for name, value in quantize(torch.randn(128, 128), PAPER[4]).items():
        layer.set_field(name, value)
    return layer


REFUSED = [torch.ones(2, 128, dtype=torch.int64), torch.ones(2, 128) * 1j, torch.tensor(1.0)]


@pytest.mark.parametrize("x", REFUSED, ids=["integer", "complex", "no dimension"])
def test_activations_that_a_layer_refuses(x):
    """As torch.nn.Linear does."""
    with pytest.raises(RuntimeError):
        nn.Linear(128, 128)(x)
    with pytest.raises(RuntimeError, match="expected floating point, 128 columns"):
        layer_of_128()(x)


def test_a_layer_follows_a_shorter_view_of_the_same_memory():
    layer, x = layer_of_128(), torch.randn(1, 128)
    layer(x)
    name = next(name for name in layer._buffers if name.endswith("W_q"))
    layer._buffers[name] = layer._buffers[name][:8]
    with pytest.raises(RuntimeError):  # torch's product, which refuses it
        layer(x)
