"""The memory that was computed is the memory that a model uses, and the picture shows the same."""

from collections import defaultdict
from dataclasses import replace

import pytest
import torch
from matplotlib.text import Text

from mixtral_offload import from_pretrained
from mixtral_offload.analysis.plots.memory import COLUMNS, LOOKS, plot_memory
from mixtral_offload.core.placement import Sizes, make_plan
from mixtral_offload.errors import OffloadError, OptionError
from mixtral_offload.models.checkpoint import Checkpoint, open_checkpoint
from mixtral_offload.runtime import memory, options
from mixtral_offload.runtime.memory import DEVICE_PARTS, MemoryUse, memory_use
from mixtral_offload.runtime.options import MARGIN_BYTES, dense_bytes, device_needs, parse_options
from mixtral_offload.weights.native import find_native
from mixtral_offload.weights.safetensors_io import StoredTensor
from mixtral_offload.weights.source import DEMO

RAM = {"vram": "12MB", "context_length": 128, "cache_size": 4}
DISK = {**RAM, "vram": "9MB"}
PREDICTIONS = {**RAM, "prefetch": 2, "look_ahead": 2, "throttle": "60MB"}
RESIDENT = {"vram": "9MB", "context_length": 128, "cache_size": "auto", "prefetch": 2}
MIXED = {**RAM, "cache_size": [2, 2, 3, 4, 5, 6], "shared_slots": True}
CASES = {"ram": RAM, "disk": DISK, "predictions": PREDICTIONS, "resident": RESIDENT, "mixed": MIXED}
STORES = {"ram": "ram", "disk": "disk", "predictions": "ram", "resident": None, "mixed": "ram"}


def use_of(**options) -> MemoryUse:
    return memory_use(device="cpu", **options)


def mixtral_on_cuda(vram=15_000_000_000, ram=9_500_000_000) -> MemoryUse:
    """Mixtral-8x7B at 2 bits, by hand."""
    needs = {"dense part": 1_550_000_000, "KV cache": 537_000_000, "scratch": 1_400_000_000}
    sizes = Sizes(range(32), 8, 2, 66_400_000)
    plan = make_plan(sizes, vram - sum(needs.values()) - 3 * sizes.expert_bytes, ram)
    rows = (plan.n_resident, sum(plan.slots.values()), 3)
    experts = dict(zip(DEVICE_PARTS[3:], (n * sizes.expert_bytes for n in rows)))
    disk = {"experts": sizes.total * sizes.expert_bytes, "dense part": 1_550_000_000}
    return MemoryUse(plan, {**needs, **experts}, {"experts in RAM": plan.ram_bytes}, disk, vram, ram)


@pytest.mark.parametrize("name", CASES)
def test_parts_are_the_plan_s_and_stay_within_the_budget(name):
    use = use_of(**CASES[name])
    assert use.plan.store == STORES[name] and use.runs_from_disk == (name == "disk")
    assert tuple(use.device) == DEVICE_PARTS
    assert use.device["resident experts"] + use.device["cache slots"] == use.plan.device_bytes
    assert use.ram == ({"experts in RAM": use.plan.ram_bytes} if use.plan.store == "ram" else {})
    assert use.device["staging"] == (5 * use.plan.sizes.expert_bytes if name == "predictions" else 0)
    asked = int(float(CASES[name]["vram"].removesuffix("MB")) * 1e6)
    assert use.shared_memory and use.device_budget == use.ram_budget == asked
    assert use.device_bytes + use.ram_bytes <= asked
    checkpoint = open_checkpoint(DEMO)
    parsed = parse_options({"device": "cpu", **CASES[name]})
    assert sum(device_needs(checkpoint, parsed).values()) == dense_bytes(checkpoint, parsed)
    assert use.device_bytes == dense_bytes(checkpoint, parsed) + use.plan.device_bytes + use.device["staging"]
    files = sum(path.stat().st_size for path in DEMO.glob("*.safetensors"))
    assert 0.97 * files < use.disk_bytes < files  # but for the headers


@pytest.mark.parametrize("name", CASES)
def test_a_model_built_with_the_same_options_is_what_was_said(name, offloaded):
    use, model = use_of(**CASES[name]), offloaded(**CASES[name])
    cache = model.offload.cache
    assert model.offload.plan == use.plan
    assert cache.n_bytes == sum(use.device[part] for part in DEVICE_PARTS[3:])
    assert (cache.store.n_bytes if use.ram else 0) == use.ram_bytes
    kept = {tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}
    assert sum(kept.values()) == use.device["dense part"]


def test_other_checkpoints(published, offloaded):
    for folder in (published, DEMO.parent / "fp16"):
        asked = {"cache_size": 2, "ram": "40MB"}
        use, model = memory_use(folder, device="cpu", **asked), offloaded(folder, **asked)
        assert use.plan == model.offload.plan
        assert (
            use.disk["experts"] == len(model.offload.checkpoint.experts) * model.offload.layout.stored_bytes
        )


def test_no_weights_are_read(monkeypatch):
    for owner, name in ((Checkpoint, "read_expert"), (StoredTensor, "read_into"), (torch, "from_file")):
        monkeypatch.setattr(owner, name, lambda *_, **__: pytest.fail("weights were read"))
    assert use_of(**DISK).disk_bytes > 0


def test_a_card_has_a_margin_and_a_budget_of_its_own(monkeypatch):
    for module in (memory, options):
        monkeypatch.setattr(module, "budgets", lambda options: (options.vram, options.ram))
    parsed = parse_options({"device": "cpu", "vram": "609MB", "ram": "2MB", "cache_size": "auto"})
    cuda = replace(
        parsed, device=torch.device("cuda"), dtype=torch.float16, context_length=128
    ).with_prefetch()
    checkpoint = open_checkpoint(DEMO)
    use = memory.memory_of(checkpoint, replace(cuda, vram=605_500_000))
    assert not use.shared_memory and use.device_bytes <= use.device_budget and use.ram_bytes <= use.ram_budget
    assert use.device["scratch"] == device_needs(checkpoint, cuda)["scratch"] + MARGIN_BYTES
    assert use.device["resident experts"] and use.device["cache slots"] and use.ram
    assert use.device["staging"] == 3 * use.plan.sizes.expert_bytes
    assert memory.memory_of(checkpoint, cuda).device["staging"] == 0  # all are resident: nothing to predict


@pytest.mark.gpu
def test_on_a_card(offloaded):
    asked = {"device": "cuda", "vram": "700MB", "ram": "2GB", "cache_size": 3}
    use, model = memory_use(**asked), offloaded(**asked)
    assert use.plan == model.offload.plan and not use.shared_memory and use.device_bytes <= 700e6
    assert model.offload.cache.n_bytes == sum(use.device[part] for part in DEVICE_PARTS[3:])


REFUSED = [
    {"vram": "1MB"}, {"vram": "17MB"}, {"vram": "19MB", "store": "ram"}, {"cache_size": 1}, {"cache_size": 9},
    {"cache_size": [2]}, {"cache": 3}, {"prefetch": -1}, {"device": "tpu"}, {"store": "tape"},
    {"dtype": "int8"}, {"policy": "random"}, {"vram": 0},
]  # fmt: skip


def test_refusals_are_those_of_from_pretrained(tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    cases = [((), {"vram": "40MB", **options}) for options in REFUSED] + [
        ((tmp_path / "none",), {}),
        ((broken,), {}),
    ]
    for arguments, asked in cases:
        errors = []
        for function in (from_pretrained, memory_use):
            with pytest.raises(OffloadError) as caught:
                function(*arguments, **{"device": "cpu", **asked})
            errors.append((caught.type, str(caught.value)))
        assert errors[0] == errors[1]


@pytest.mark.both_products
def test_as_text():
    text = str(use_of(**PREDICTIONS))
    assert text.startswith(str(use_of(**PREDICTIONS).plan))
    for words in ("staging 396 kB", "RAM 3.8 MB: experts in RAM 3.8 MB", "read at the start only"):
        assert words in text
    both = "10.7" if find_native()[0] is None else "10.4"  # kernels dequantize no whole matrix
    assert f"device and RAM are one memory: {both} MB of 12.0 MB free" in text
    assert "experts are read while running" in str(use_of(**DISK))
    text = str(mixtral_on_cuda())
    assert "device 14.97 GB of 15.00 GB free: dense part 1.55 GB" in text and "one memory" not in text


def bars(axes) -> dict[int, list[tuple[float, float]]]:
    """row -> (left, width) of each part, as drawn."""
    found = defaultdict(list)
    for container in axes.containers:
        for bar in container:
            row = round(bar.get_y() + bar.get_height() / 2)
            found[row].append((bar.get_x(), bar.get_width()))
    return found


def test_the_bars_are_the_array_and_the_array_is_the_use():
    uses = {"one": use_of(**PREDICTIONS), "two": use_of(**DISK), "three": mixtral_on_cuda()}
    figure, numbers = plot_memory(uses)
    assert numbers.shape == (3, len(COLUMNS))
    rows = ("device", "RAM", "disk")
    for axes, use, of in zip(figure.axes, uses.values(), numbers.tolist()):
        parts = dict(zip(COLUMNS, of))
        for row, given in zip(rows, (use.device, use.ram, use.disk)):
            said = {part: n for (where, part), n in parts.items() if where == row}
            assert {part: n for part, n in said.items() if n} == {part: n for part, n in given.items() if n}
            drawn = bars(axes)[rows.index(row)]
            assert [width for _, width in drawn] == [n for n in said.values() if n]
            begin = use.device_bytes if row == "RAM" and use.shared_memory else 0
            assert [left for left, _ in drawn] == [
                begin + sum(w for _, w in drawn[:i]) for i in range(len(drawn))
            ]


@pytest.mark.both_products
def test_the_frame_is_what_is_free_where_it_can_be_seen():
    def frames(use):
        patches = plot_memory(use)[0].axes[0].patches
        return [(patch.get_width(), patch.get_height()) for patch in patches if not patch.get_fill()]

    assert frames(use_of(**RAM)) == [(12e6, pytest.approx(1.86))]  # around both
    assert [width for width, _ in frames(mixtral_on_cuda())] == [15e9, 9.5e9]
    assert frames(use_of(**{**RAM, "vram": "20GB"})) == []
    texts = [text.get_text() for text in plot_memory(use_of(**RAM))[0].axes[0].texts]
    both = "10.3" if find_native()[0] is None else "10.1"
    assert f"one memory: {both} MB of 12.0 MB free" in texts


def of_all_widths() -> dict[str, MemoryUse]:
    """Parts that grow little by little, so that some of them have only just room for a label."""
    return {
        f"${context}": use_of(**{**PREDICTIONS, "vram": "20MB", "context_length": context})
        for context in range(128, 700, 64)
    }


@pytest.mark.parametrize("make", [mixtral_on_cuda, of_all_widths])
def test_nothing_is_cut_off_and_labels_stay_in_their_bars(make):
    figure, _ = plot_memory(make())
    figure.draw_without_rendering()
    assert figure.get_suptitle() and all(axes.get_xlabel().startswith("• ") for axes in figure.axes)
    assert {text.get_text() for text in figure.legends[0].get_texts()} <= {*LOOKS, "free to use"}
    page = figure.bbox.padded(1)
    for axes in figure.axes:
        shown = [text for text in axes.findobj(Text) if text.get_text()]
        boxes = [text.get_window_extent() for text in shown]
        assert all(page.containsx(x) for box in boxes for x in (box.x0, box.x1))
        assert all(page.containsy(y) for box in boxes for y in (box.y0, box.y1))
        texts = [text.get_window_extent() for text in axes.texts]
        assert not any(a.overlaps(b) for i, a in enumerate(texts) for b in texts[:i])
        patches = [bar.get_window_extent() for container in axes.containers for bar in container]
        labels = [text.get_window_extent() for text in axes.texts if text.get_ha() == "center"]
        assert labels and all(
            any(p.contains(t.x0, t.y0) and p.contains(t.x1, t.y1) for p in patches) for t in labels
        )


def test_nothing_to_show():
    with pytest.raises(OptionError, match="no memory to show"):
        plot_memory({})
