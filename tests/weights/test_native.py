"""The package's kernels: every width and layout, on all instruction sets that the machine has or emulates."""

import ctypes
import os
import shutil
import subprocess
import sys
import threading
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from mixtral_offload import from_pretrained
from mixtral_offload.errors import OptionError
from mixtral_offload.weights import native
from mixtral_offload.weights.hqq import (
    PAPER,
    Quantization,
    QuantizedLinear,
    dequantize,
    field_specs,
    matmul,
    quantize,
)
from mixtral_offload.weights.layout import ExpertLayout, expert_forward
from mixtral_offload.weights.native import NativeLinear
from mixtral_offload.weights.products import Kind, choose_products
from tests.twin import unrounded

FORMATS = [
    *(PAPER[bits] for bits in (2, 3, 4, 8, 16)),
    Quantization(2, 16),
    Quantization(2, 20),
    Quantization(2, 10, None, True),
    Quantization(3, 64, 128, True),
    Quantization(3, 16, None, True),
    Quantization(3, 16, split=True),
    Quantization(3, 8, 64, split=True),
    Quantization(4, 64),
    Quantization(4, 6),
    Quantization(4, 32, 128, True),
    Quantization(8, 32, 64),
]
#: rows that are whole blocks, parts of one, no whole vector; scales of scales that wrap within a row
SHAPES = [(256, 512), (512, 192), (240, 640), (128, 50), (960, 33), (480, 1000)]
#: one, pairs, most that share the unpacking, tiles with rests
TOKENS = [1, 2, 3, 8, 9, 17, 130]


def _levels():
    library, _ = native._library()
    found = []
    for name in native.NAMES if library else ():
        try:
            found.append(native.Native(library, name))
        except OptionError:
            continue
    return found


LEVELS = _levels()
each_level = pytest.mark.parametrize("kernels", LEVELS, ids=lambda of: of.name)


def fields_of(shape, quantization, seed=0):
    """Random words; scales and zeros that differ, so that a mistake in them shows."""
    random = torch.Generator().manual_seed(seed)
    fields = {}
    for name, (dtype, dims) in field_specs(shape, quantization).items():
        if dtype == torch.int32:
            fields[name] = torch.randint(0, 1 << 30, dims, generator=random, dtype=dtype)
        elif dtype == torch.uint8:
            fields[name] = torch.randint(0, 256, dims, generator=random, dtype=dtype)
        else:
            fields[name] = (torch.rand(dims, generator=random) + 0.5).to(dtype)
    middle = (2**quantization.bits - 1) / 2
    if "meta.zero" in fields:
        fields["meta.zero"] *= middle
    if "meta.meta_zero.zero" in fields:  # zeros around the middle of the values
        fields["meta.meta_zero.scale"].fill_(middle / 100)
        fields["meta.meta_zero.zero"].fill_(28)
    if "meta.meta_scale.zero" in fields:
        fields["meta.meta_scale.zero"].mul_(-40)
        fields["meta.meta_scale.scale"].mul_(0.01)
    return fields


def fitting(quantization):
    for shape in SHAPES:
        groups = shape[0] * shape[1] // (quantization.group_size or 1)
        if quantization.bits == 16 or (
            shape[0] % quantization.group_size == 0 and groups % (quantization.scale_group_size or 1) == 0
        ):
            yield shape


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def inputs(n_tokens, k):
    x = torch.randn(n_tokens, k, generator=torch.Generator().manual_seed(n_tokens))
    x[:, 3] *= 50  # as activations have them
    return x


def test_the_kernels_are_built_here():
    """Where the machine has a C compiler, the installation above must have made them."""
    library, why = native._library()
    assert ctypes.sizeof(native.Matrix) == 13 * 8  # as interface.h has it
    assert library is not None or shutil.which("cc") is None, why
    assert library is None or {level.name for level in LEVELS} >= {"portable"}


@each_level
@pytest.mark.parametrize("quantization", FORMATS, ids=str)
def test_products_are_those_of_the_dequantized_matrix(kernels, quantization):
    """Within fp16's rounding of each weight; few tokens bit for bit as each alone."""
    n_shapes = 0
    for shape in fitting(quantization):
        n_shapes += 1
        fields = fields_of(shape, quantization)
        weight = dequantize(fields, shape, quantization, torch.float32)
        for n_tokens, fast in product(TOKENS, (False, True)):
            x = inputs(n_tokens, shape[1])
            found = kernels.linear(x, fields, shape, quantization, fast)
            limit = 0.1 if fast and n_tokens <= 8 else 1e-3
            assert relative(found, x @ weight.T) < limit, (shape, n_tokens, fast)
            if 1 < n_tokens <= 8:
                alone = [kernels.linear(row, fields, shape, quantization, fast) for row in x.split(1)]
                assert torch.equal(found, torch.cat(alone))
    assert n_shapes >= 2


@each_level
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_plain_weights_of_other_types(kernels, dtype):
    shape, quantization = (72, 50), Quantization(16)
    fields = {"weight": torch.randn(shape).to(dtype)}
    for n_tokens in TOKENS:
        x = inputs(n_tokens, shape[1])
        found = kernels.linear(x, fields, shape, quantization)
        assert relative(found, x @ fields["weight"].float().T) < 1e-5


@each_level
def test_activations_in_half_precision(kernels):
    shape, quantization = (256, 512), PAPER[4]
    fields, x = fields_of(shape, quantization), inputs(3, 512)
    for dtype in (torch.float16, torch.bfloat16):
        found = kernels.linear(x.to(dtype), fields, shape, quantization)
        expected = kernels.linear(x.to(dtype).float(), fields, shape, quantization)
        assert found.dtype == dtype and torch.equal(found, expected.to(dtype))


@each_level
@pytest.mark.parametrize("quantization", FORMATS, ids=str)
def test_the_largest_values_do_not_overflow(kernels, quantization):
    """All bits set, zeros of 0, and equal activations: every sum of integers is as large as it can be."""
    shape = (960, 1024)
    if quantization.bits != 16 and shape[0] % quantization.group_size:
        pytest.skip("no such matrix")
    fields = fields_of(shape, quantization)
    for name, value in fields.items():
        if not name.startswith("meta."):
            value.fill_({torch.uint8: 255, torch.int32: (1 << 30) - 1}.get(value.dtype, 1))
    if "meta.zero" in fields:
        fields["meta.zero"].zero_()
    elif "meta.zero_q" in fields:
        fields["meta.zero_q"].fill_(255)
        fields["meta.meta_zero.scale"].fill_(0.5 if quantization.bits == 2 else 0.25)
        fields["meta.meta_zero.zero"].fill_(256)
    for name in ("meta.scale", "meta.meta_scale.scale"):
        if name in fields:
            fields[name].fill_(1)
    if "meta.scale_q" in fields:
        fields["meta.scale_q"].fill_(8)
        fields["meta.meta_scale.zero"].zero_()
    weight = dequantize(fields, shape, quantization, torch.float32)
    for sign, fast in product((1, -1), (False, True)):
        x = torch.full((2, 1024), 0.7 * sign)
        assert relative(kernels.linear(x, fields, shape, quantization, fast), x @ weight.T) < 2e-3


WIDTHS = [*(PAPER[bits] for bits in (2, 3, 4, 8)), Quantization(4, 64), Quantization(3, 64, 128, True)]


@each_level
@pytest.mark.parametrize("quantization", WIDTHS, ids=str)
def test_a_large_activation_of_a_small_column(kernels, quantization):
    """Its products may be the largest by far and count for nothing: the others keep their digits."""
    shape, wide = (128, 512), [1.0, 30.0, 1e3, 1e5]
    for size in (1.0, 0.1, 0.01, 0.0):
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.02
        weight[:, 100] *= size
        fields = quantize(weight, quantization)
        exact = unrounded(fields, shape, quantization)
        x = torch.randn(len(wide), shape[1], generator=torch.Generator().manual_seed(2))
        x[:, 100] = torch.tensor(wide)
        found = kernels.linear(x, fields, shape, quantization)
        for row, expected in zip(found, x.double() @ exact.T):
            assert relative(row.double(), expected) < 1e-3
        for n in (1, 3):  # with others or alone: the same bits
            assert torch.equal(found[n : n + 1], kernels.linear(x[n : n + 1], fields, shape, quantization))


@each_level
def test_what_is_no_number_shows(kernels):
    """nan and inf in, no finite value out; zeros in, zeros out; tiny and huge values survive."""
    for quantization, n_tokens, fast in product(
        (PAPER[2], PAPER[3], PAPER[4], PAPER[8]), (1, 3, 20), (False, True)
    ):
        shape = (256, 512)
        fields = fields_of(shape, quantization)
        expected = inputs(n_tokens, 512)
        weight = dequantize(fields, shape, quantization, torch.float32)
        for bad in (float("nan"), float("inf"), -float("inf")):
            x = expected.clone()
            x[0, 300] = bad
            found = kernels.linear(x, fields, shape, quantization, fast)
            assert not found[0].isfinite().any() and found[1:].isfinite().all()
        assert not kernels.linear(torch.zeros(n_tokens, 512), fields, shape, quantization, fast).any()
        for factor in (1e-20, 1e20):
            found = kernels.linear(expected * factor, fields, shape, quantization, fast)
            assert relative(found.double(), (expected @ weight.T).double() * factor) < 5e-2


def layout_of(quantization, hidden=192, intermediate=384):
    shapes = {"gate": (intermediate, hidden), "up": (intermediate, hidden), "down": (hidden, intermediate)}
    fields = {
        matrix: fields_of(shape, quantization, seed) for seed, (matrix, shape) in enumerate(shapes.items())
    }
    sizes = {(m, name): (of.dtype, of.numel()) for m, some in fields.items() for name, of in some.items()}
    layout = ExpertLayout.build(hidden, intermediate, sizes)
    return layout, fields


def rows_of(layout, quantization, n):
    """n experts in rows of their own."""
    rows = []
    for expert in range(n):
        row = torch.zeros(layout.n_bytes + 64, dtype=torch.uint8)
        row = row[-row.data_ptr() % 64 :][: layout.n_bytes]
        for seed, (matrix, views) in enumerate(layout.views(row).items()):
            fields = fields_of(layout.shapes[matrix], quantization, 10 * expert + seed)
            for name, value in views.items():
                value.copy_(fields[name].view(value.shape))
                if "scale" in name and value.dtype == torch.float16 and "zero" not in name:
                    value.mul_(0.02)  # so that silu sees values near 1
        rows.append(row)
    return rows


def gated(x):
    gate, up = x.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


@each_level
@pytest.mark.parametrize(
    "quantization", [PAPER[2], PAPER[3], Quantization(3, 64), PAPER[8], PAPER[16]], ids=str
)
@pytest.mark.parametrize("hidden, intermediate", [(192, 384), (384, 640)])
def test_all_experts_of_a_layer_in_one_call(kernels, quantization, hidden, intermediate):
    """As each expert alone, bit for bit, and nearly as torch computes it, which rounds scales to fp16.

    Of 60 random inputs, the largest difference was 0.002, at 3 bits.
    """
    layout, _ = layout_of(quantization, hidden, intermediate)
    rows, experts = rows_of(layout, quantization, 5), kernels.experts(layout)
    addresses = [row.data_ptr() for row in rows]
    x = inputs(1, hidden)
    together = experts.run(x, addresses)
    for row, found in zip(rows, together):
        assert torch.equal(found, experts.run_one(x, layout.views(row))[0])
        assert relative(found, expert_forward(x, layout.views(row), layout, gated)[0]) < 3e-3
    counts = [1, 3, 12, 2, 8]
    x = inputs(sum(counts), hidden)
    together = experts.run(x, addresses, counts)
    for row, own, found in zip(rows, x.split(counts), together.split(counts)):
        assert torch.equal(found, experts.run_one(own, layout.views(row)))
        assert relative(found, expert_forward(own, layout.views(row), layout, gated)) < 3e-3


@each_level
@pytest.mark.parametrize("n", [1, 2, 3, 4, 8, 13, 64])
@pytest.mark.parametrize("hidden", [192, 500])
def test_a_token_s_weighted_sum_does_not_depend_on_others(kernels, n, hidden):
    """One call for a token, and for many the sum of results, one after the other: the same bits."""
    layout, _ = layout_of(Quantization(4, 20 if hidden == 500 else 64), hidden, 2 * hidden)
    rows, experts = rows_of(layout, layout.quantization["gate"], 3), kernels.experts(layout)
    addresses = [rows[i % 3].data_ptr() for i in range(n)]
    random = torch.Generator().manual_seed(n)
    for weights in (torch.rand(1, n, generator=random), torch.rand(1, 2 * n, generator=random)[:, ::2]):
        x = torch.randn(1, hidden, generator=random)
        results = experts.run(x, addresses)
        expected = results[0] * weights[0, 0]
        for row, weight in zip(results[1:], weights[0, 1:]):
            expected = expected + row * weight
        assert torch.equal(experts.run_token(x, addresses, weights)[0], expected)
        for n_tokens in (1, 2, 9, 300):
            many = results.expand(n_tokens, n, hidden)
            found = kernels.weighted_sums(many, weights.expand(n_tokens, n))
            assert torch.equal(found, expected.expand(n_tokens, hidden))


@pytest.mark.parametrize("quantization", [PAPER[2], PAPER[3], Quantization(4, 64)], ids=str)
def test_a_layer_follows_its_tensors(quantization):
    """It describes its matrix to the kernels once: and again when the memory of any tensor is another one."""
    shape, x = (128, 192), torch.randn(2, 192)
    layer = QuantizedLinear(shape, quantization, NativeLinear(LEVELS[0]))
    layer.to_empty(device="cpu")
    for seed in range(3):
        for name, value in fields_of(shape, quantization, seed).items():
            layer.set_field(name, value)
        assert torch.equal(layer(x), LEVELS[0].linear(x, layer.fields, shape, quantization))
    for name, value in fields_of(shape, quantization, 7).items():  # one after the other
        layer.set_field(name, value)
        assert torch.equal(layer(x), LEVELS[0].linear(x, layer.fields, shape, quantization))
        layer.fields[name].copy_(value.flip(0))  # the same memory
        assert torch.equal(layer(x), LEVELS[0].linear(x, layer.fields, shape, quantization))
    for n_tokens in (1, 9, 1, 130, 3):
        x = torch.randn(n_tokens, 192)
        assert torch.equal(layer(x), LEVELS[0].linear(x, layer.fields, shape, quantization))


def test_what_is_not_stored_so_is_left_to_torch():
    """Buffers that were exchanged for others: strided, or of another type."""
    shape, quantization, x = (128, 192), Quantization(4, 64), torch.randn(2, 192)
    layer = QuantizedLinear(shape, quantization, NativeLinear(LEVELS[0]))
    layer.to_empty(device="cpu")
    for name, value in fields_of(shape, quantization).items():
        layer.set_field(name, value)
    expected = layer(x)
    for name, buffer in layer._names.items():
        for other in (
            torch.stack([layer.fields[name]] * 2, -1)[..., 0],
            layer.fields[name].double() if "scale" in name else layer.fields[name].clone(),
        ):
            found = torch.func.functional_call(layer, {buffer: other}, (x,))
            assert relative(found, expected) < 2e-3
    assert torch.equal(layer(x), expected)
    assert LEVELS[0].weighted_sums(torch.empty(2, 0, 8), torch.empty(2, 0)).tolist() == [[0.0] * 8] * 2


def test_more_experts_than_a_call_takes():
    layout, _ = layout_of(Quantization(4, 64))
    rows, experts = rows_of(layout, Quantization(4, 64), 3), LEVELS[0].experts(layout)
    addresses = [rows[i % 3].data_ptr() for i in range(native.MOST_EXPERTS * 2 + 5)]
    x = torch.randn(1, 192)
    assert torch.equal(experts.run(x, addresses)[-3:], experts.run(x, addresses[-3:]))
    counts = [1 + i % 2 for i in range(len(addresses))]
    x = torch.randn(sum(counts), 192)
    assert torch.equal(
        experts.run(x, addresses, counts)[-1:], experts.run(x[-1:], addresses[-1:], counts[-1:])
    )


def test_answers_do_not_depend_on_threads():
    """Whatever number of threads, several of Python at once, and in a forked process."""
    shape, quantization = (512, 1024), PAPER[2]
    fields, x = fields_of(shape, quantization), inputs(4, 1024)
    kernels, found, before = LEVELS[0], [], torch.get_num_threads()
    expected = kernels.linear(x, fields, shape, quantization)
    try:
        for n in (1, 2, 3, 7):
            torch.set_num_threads(n)
            assert torch.equal(kernels.linear(x, fields, shape, quantization), expected)
    finally:
        torch.set_num_threads(before)

    def many():
        found.extend(kernels.linear(x, fields, shape, quantization) for _ in range(50))

    threads = [threading.Thread(target=many) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 200 and all(torch.equal(of, expected) for of in found)


FORKED = """
import os, torch
from mixtral_offload import from_pretrained
model, ids = from_pretrained(cache_size=8), torch.arange(5, 37).view(1, -1)
with torch.no_grad():
    expected = model(ids).logits
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(model(ids).logits, expected) else 3)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


def test_a_forked_process_computes_alone():
    """Its parent's threads are not there to wait for."""
    subprocess.run([sys.executable, "-c", FORKED], check=True, timeout=120)


@each_level
def test_a_model_answers_alike_at_every_cache_size(kernels, monkeypatch):
    """Bit for bit, for prompts and token by token, exact and fast."""
    monkeypatch.setenv(native.FORCE, kernels.name)
    ids = torch.arange(5, 37).view(1, -1)
    for precision in ("exact", "fast"):
        found = []
        for options in (
            {"cache_size": 2, "store": "disk"},
            {"cache_size": 3, "prefetch": 2},
            {"cache_size": 8},
        ):
            model = from_pretrained(precision=precision, **options)
            products = model.offload.computation.products
            assert products.kind is Kind.NATIVE and products.native.name == kernels.name
            with torch.no_grad():
                out = model.generate(
                    ids, max_new_tokens=12, do_sample=False, return_dict_in_generate=True, output_logits=True
                )
                few = model(ids.view(4, 8)[:, :2]).logits
                found.append((model(ids).logits, few, out.sequences, torch.stack(out.logits)))
        assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))


def test_what_the_environment_forces(monkeypatch):
    layout, _ = layout_of(Quantization(4, 64))
    monkeypatch.setenv(native.FORCE, "none")
    products = choose_products("auto", "exact", layout, torch.device("cpu"))
    assert products.kind is not Kind.NATIVE and native.FORCE in products.why
    with pytest.raises(OptionError, match="fast"):
        choose_products("auto", "fast", layout, torch.device("cpu"))
    monkeypatch.setenv(native.FORCE, "sse9")
    with pytest.raises(OptionError, match="sse9"):
        choose_products("auto", "exact", layout, torch.device("cpu"))
    missing = "neon" if LEVELS[0].name.startswith(("avx", "portable")) else "avx2"
    monkeypatch.setenv(native.FORCE, missing)
    with pytest.raises(OptionError, match=missing):
        choose_products("auto", "exact", layout, torch.device("cpu"))


def test_a_library_of_other_sources_is_not_used(monkeypatch, tmp_path):
    """Also none at all, and one that is broken: the reason is said, and what to do."""
    built = next(native.FOLDER.glob("library*.so"))
    for content, reason in (
        (built.read_bytes(), "not of these sources"),
        (b"no library", "cannot be loaded"),
    ):
        folder = tmp_path / reason
        folder.mkdir()
        (folder / built.name).write_bytes(content)
        (folder / "other.c").write_text("/* changed */")
        monkeypatch.setattr(native, "FOLDER", folder)
        library, why = native._library.__wrapped__()
        assert library is None and reason in why and "pip install" in why
    (folder / built.name).unlink()
    library, why = native._library.__wrapped__()
    assert library is None and "without a C compiler" in why


def test_without_kernels_a_model_runs_and_says_why(monkeypatch):
    monkeypatch.setenv(native.FORCE, "none")
    model = from_pretrained(cache_size=4)
    assert "no kernels of this package" in str(model.offload.computation.products)
    with torch.no_grad():
        assert model(torch.arange(5, 20).view(1, -1)).logits.isfinite().all()


@pytest.mark.parametrize("options", [{"precision": "fsat"}, {"precision": None}, {"precision": True},
    {"precision": "fast", "dequantize_on_load": True}, {"precision": "fast", "compile": True}])  # fmt: skip
def test_a_precision_that_there_is_not_is_refused(options):
    with pytest.raises(OptionError, match="precision"):
        from_pretrained(device="cpu", **options)


def test_groups_that_cross_rows_are_dequantized():
    shape, quantization = (24, 32), Quantization(4, 64)
    fields, x = fields_of(shape, quantization), torch.randn(2, 32)
    found = LEVELS[0].linear(x, fields, shape, quantization)
    assert torch.equal(found, matmul(x, fields, shape, quantization))


ROOT = Path(__file__).parents[2]


def driver(folder, compiler, *flags):
    """Compile the driver with all kernels; return the program."""
    program = folder / "driver"
    sources = [str(path) for path in sorted(native.FOLDER.glob("*.c"))]
    here = Path(__file__).with_name("native_driver.c")
    common = ["-std=c11", "-ffp-contract=off", "-fno-math-errno", '-DSOURCES=""']
    subprocess.run([compiler, *common, *flags, "-o", program, here, *sources, "-lpthread", "-lm"], check=True)
    return program


def by_driver(command, folder, kernels, cases):
    """Let the program multiply; return the results."""
    with open(folder / "cases", "wb") as file:
        for fields, shape, quantization, x, fast in cases:
            matrix = native.matrix_of(fields, shape, quantization)
            names = [
                next((of for of in ((name,) if isinstance(name, str) else name) if of in fields), None)
                for name in native.POINTERS.values()
            ]
            if quantization.bits == 16:
                names[0] = "weight"
            values = [b"" if name is None else fields[name].numpy().tobytes() for name in names]
            head = [matrix.n, matrix.k, matrix.group, matrix.n_meta, matrix.format, len(x), int(fast)]
            file.write(np.array([*head, *map(len, values)], dtype="<i8").tobytes())
            file.write(b"".join(values) + x.numpy().tobytes())
    subprocess.run([*command, kernels, folder / "cases", folder / "results"], check=True, timeout=600)
    found = torch.from_numpy(np.fromfile(folder / "results", dtype="<f4"))
    return [
        of.view(len(x), shape[0])
        for of, (_, shape, _, x, _) in zip(
            found.split([len(x) * shape[0] for _, shape, _, x, _ in cases]), cases
        )
    ]


def all_cases():
    return [
        (fields_of(shape, quantization), shape, quantization, inputs(n_tokens, shape[1]), fast)
        for quantization in FORMATS
        for shape in fitting(quantization)
        for n_tokens, fast in ((1, False), (3, False), (3, True), (9, False))
    ]


@pytest.mark.parametrize("kernels", ["neon", "portable"])
def test_on_an_emulated_arm_processor(tmp_path, kernels):
    """Compiled for 64-bit ARM and run by qemu; set REQUIRE_ARM=1 where both must be there."""
    compiler, emulator = shutil.which("aarch64-linux-gnu-gcc"), shutil.which("qemu-aarch64")
    if not compiler or not emulator:
        assert not os.environ.get("REQUIRE_ARM"), "no aarch64-linux-gnu-gcc, or no qemu-aarch64"
        pytest.skip("no compiler or no emulator for ARM")
    cases = all_cases()
    found = by_driver([emulator, driver(tmp_path, compiler, "-O1", "-static")], tmp_path, kernels, cases)
    for of, (fields, shape, quantization, x, fast) in zip(found, cases):
        expected = x @ dequantize(fields, shape, quantization, torch.float32).T
        assert relative(of, expected) < (0.1 if fast and len(x) <= 8 else 1e-3), (shape, quantization, fast)


def test_no_access_is_out_of_bounds(tmp_path):
    """Every case with each field in memory of its own, watched by the compiler's sanitizers."""
    compiler = shutil.which("cc")
    if not compiler:
        pytest.skip("no compiler")
    flags = ["-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    if not any(kernels.name.startswith("avx512") for kernels in LEVELS):
        flags.append("-DWITHOUT_AVX512")
    program = driver(tmp_path, compiler, *flags)
    for kernels in LEVELS:
        by_driver([program], tmp_path, kernels.name, all_cases())
