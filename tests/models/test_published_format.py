"""The published format, against logits computed elsewhere; and the same through our writer and reader."""

import pytest
import torch
from safetensors import safe_open

from mixtral_offload import convert_checkpoint
from mixtral_offload.models.checkpoint import open_checkpoint
from mixtral_offload.weights.hqq import PAPER, Quantization
from tests.twin import limit


@pytest.fixture(scope="module", params=["published", "rewritten"])
def folder(request, published, tmp_path_factory):
    if request.param == "published":
        return published
    return convert_checkpoint(published, tmp_path_factory.mktemp("ours") / "rewritten")


@pytest.mark.both_products
@pytest.mark.parametrize("cache_size, store", [(2, "ram"), (3, "disk"), (8, "auto")])
@torch.no_grad()
def test_logits_and_greedy_continuation(folder, expected, offloaded, cache_size, store):
    model = offloaded(folder, cache_size=cache_size, store=store)
    logits = model(expected["input_ids"]).logits
    assert (logits - expected["logits"]).abs().max() < limit(1e-4, 2e-2)
    # the fixture's continuation was made with token 2 as padding, of which the prompt has one
    n_prompt = expected["input_ids"].shape[1]
    greedy = model.generate(
        expected["input_ids"][:1],
        max_new_tokens=expected["greedy"].shape[1] - n_prompt,
        do_sample=False,
        pad_token_id=2,
        eos_token_id=None,
    )
    assert torch.equal(greedy, expected["greedy"])


@pytest.mark.both_products
@torch.no_grad()
def test_router_logits(folder, expected, offloaded):
    model = offloaded(folder, cache_size=2)
    routers = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda module, inputs, output: routers.append(output[0]))
    model(expected["input_ids"])
    assert (torch.stack(routers) - expected["router"]).abs().max() < limit(1e-4, 2e-2)


def test_our_writer_keeps_every_byte_under_whole_keys(published, tmp_path):
    ours, theirs = (
        open_checkpoint(convert_checkpoint(published, tmp_path / "ours")),
        open_checkpoint(published),
    )
    assert set(ours.keys) == set(theirs.keys)
    names = {"gate": "w1", "up": "w3", "down": "w2"}
    for (layer, expert), fields in theirs.experts.items():
        assert len({stored.path for stored in ours.experts[layer, expert].values()}) == 1
        for (matrix, field), stored in fields.items():
            key = f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{names[matrix]}.{field}"
            with safe_open(ours.experts[layer, expert][matrix, field].path, "pt") as file:
                assert torch.equal(file.get_tensor(key), stored.read())
    for key, stored in theirs.dense.items():
        assert torch.equal(ours.dense[key].read(), stored.read())


@pytest.mark.parametrize("bits", [16, 8, 4, 3, 2])
@torch.no_grad()
def test_our_own_widths_run_and_get_worse_in_order(published, tmp_path, expected, offloaded, bits):
    """16 bits keep the fixture's logits, fewer bits cost more; 2 bits find the fixture's own grid."""
    least, most = {16: (0, 1e-5), 8: (1e-3, 0.03), 4: (0.05, 0.3), 3: (0.1, 0.6), 2: (1e-4, 0.02)}[bits]
    attention = Quantization(16) if bits == 16 else Quantization(8, 64)
    model = offloaded(convert_checkpoint(published, tmp_path / "ours", PAPER[bits], attention), cache_size=3)
    assert model.offload.layout.quantization["up"] == PAPER[bits]
    assert least <= (model(expected["input_ids"]).logits - expected["logits"]).abs().mean() < most
