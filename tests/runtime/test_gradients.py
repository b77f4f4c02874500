"""Gradients: those of transformers' own model, whatever the slots hold when backward runs."""

import functools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from mixtral_offload import (
    record,
)
from mixtral_offload.analysis.recorder import Recorder
from mixtral_offload.errors import OptionError
from mixtral_offload.weights.native import find_native
from mixtral_offload.weights.source import DEMO
from tests.twin import limit, relative_error, unrounded_twin


def _logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def _is_exact(trace, model):
    from mixtral_offload.analysis.replay import replay

    replay, stats = replay(trace), model.offload.stats
    assert (replay.hits, replay.misses) == (stats.hits, stats.misses)
    assert len(trace.use_pass) == stats.hits + stats.misses


def gradients(model, ids_of: list[list[int]]) -> list[torch.Tensor]:
    """Gradients of the embeddings of several passes of one graph."""
    embeds = []

    def keep(module, inputs, output):
        embeds.append(output.detach().requires_grad_())
        return embeds[-1]

    hook = model.get_input_embeddings().register_forward_hook(keep)
    loss = sum(model(torch.tensor([ids])).logits[0, -1].float().max() for ids in ids_of)
    loss.backward()
    hook.remove()
    return [of.grad for of in embeds]


@pytest.mark.both_products
@pytest.mark.parametrize("options", [
    {"cache_size": 2}, {"cache_size": 2, "store": "disk"}, {"cache_size": 8}, {"dequantize_on_load": True},
    {"cache_size": 2, "prefetch": 2, "throttle": "2GB"},
    {"cache_size": 2, "shared_slots": True, "policy": "lfu"},
])  # fmt: skip
@pytest.mark.parametrize("ids_of", [[[300], [700], [900]], [[300, 700, 900, 5, 6], [17, 18]]])
def test_gradients_are_the_twins(offloaded, reference, options, ids_of):
    model = offloaded(**options)
    for found, expected in zip(gradients(model, ids_of), gradients(reference, ids_of), strict=True):
        assert relative_error(found, expected) < limit(1e-4, 1e-2)


@pytest.mark.parametrize("options", [{"cache_size": 2}, {"cache_size": 8}, {"dequantize_on_load": True}])
@pytest.mark.parametrize("ids_of", [[[300]], [[300, 700, 900, 5, 6], [17]]])
def test_gradients_under_autocast_are_the_twins(offloaded, reference, options, ids_of):
    """Autograd calls backward outside of the caller's autocast."""
    grads = []
    for model in (offloaded(**options), reference):
        with torch.autocast("cpu", torch.bfloat16):
            grads.append(gradients(model, ids_of))
    for found, expected in zip(*grads, strict=True):
        assert relative_error(found, expected) < 2e-2  # bf16
    exact = gradients(reference, ids_of)
    assert all(relative_error(found, of) > 1e-4 for found, of in zip(grads[0], exact))  # it was bf16


def test_gradients_do_not_depend_on_the_cache(offloaded):
    ids_of = [[300, 700, 900, 5, 6], [17]]
    first, *others = (gradients(offloaded(cache_size=size), ids_of) for size in (8, 2, 3))
    assert all(torch.equal(a, b) for of in others for a, b in zip(first, of))


@pytest.mark.both_products
def test_gradients_of_routing_and_dense_parameters(offloaded, reference, batches):
    """Parameters that a user unfreezes: a norm, a router, the head; with padding in the batch."""
    model, batch = offloaded(cache_size=2), batches[0]
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    names = [
        "model.norm.weight",
        "model.layers.2.mlp.gate.weight",
        "model.layers.0.post_attention_layernorm.weight",
    ]
    grads = []
    for of in (model, reference):
        parameters = [of.get_parameter(name) for name in names]
        for parameter in parameters:
            parameter.requires_grad_()
        of(**batch, labels=labels).loss.backward()
        grads.append([parameter.grad for parameter in parameters])
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None
    for found, expected in zip(*grads, strict=True):
        assert relative_error(found, expected) < limit(1e-4, 1e-2)


@pytest.mark.both_products
@pytest.mark.parametrize("is_reentrant", [False, True])
def test_gradient_checkpointing(offloaded, reference, batches, is_reentrant):
    """Labels include padding. What is checkpointed reentrantly runs without gradients first."""
    batch, grads = batches[0], []
    name = "model.layers.2.input_layernorm.weight"
    for checkpointing in (False, True):
        model = offloaded(cache_size=2)
        model.get_parameter(name).requires_grad_()
        if checkpointing:
            model.train()
            model.enable_input_require_grads()
            for block in model.model.layers:  # as gradient_checkpointing_enable does, whose name changes
                block.gradient_checkpointing = True
                block._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=is_reentrant)
        model(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
        grads.append(model.get_parameter(name).grad)
    weight = reference.get_parameter(name).requires_grad_()
    reference(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
    expected, weight.grad = weight.grad, None
    weight.requires_grad_(False)
    assert all(relative_error(found, expected) < limit(1e-4, 1e-2) for found in grads)


def test_gradients_under_record_are_refused(offloaded, batches):
    model = offloaded(cache_size=2)
    model.get_parameter("model.layers.0.input_layernorm.weight").requires_grad_()
    with record(model), pytest.raises(OptionError, match="cannot be recorded"):
        model(**batches[0])


def test_a_backward_under_record_is_refused_too(offloaded):
    """Its forward ran before: nothing of it may come into the trace."""
    model = offloaded(cache_size=2)
    embeds = model.get_input_embeddings()(torch.tensor([[300, 700, 900]])).detach().requires_grad_()
    loss = model(inputs_embeds=embeds).logits.logsumexp(-1).sum()
    with record(model) as run:
        with pytest.raises(OptionError, match="cannot be recorded"):
            loss.backward()
        _logits(model, {"input_ids": torch.tensor([[5, 6]])})
    assert run.trace.n_passes == 1
    _is_exact(run.trace, model)


def test_a_backward_pass_calls_no_observer(offloaded):
    """What a display follows (a recorder that is not exclusive) are passes."""
    model = offloaded(cache_size=2)
    recorder = Recorder(model)
    gradients(model, [[300, 700, 900, 5, 6], [17, 18]])
    _logits(model, {"input_ids": torch.tensor([[5, 6]])})
    recorder.stop()
    trace = recorder.finish()
    assert trace.n_passes == 3
    for number in range(3):
        needed = trace.experts[trace.passes == number]
        for layer in range(trace.n_layers):
            of = (trace.use_pass == number) & (trace.use_layer == layer)
            assert sorted(trace.use_expert[of]) == sorted({*needed[:, layer].ravel()})


@pytest.mark.parametrize("store", ["ram", "disk"])
def test_gradients_where_slots_hold_the_products_own_dtype(offloaded, store):
    """16-bit experts in 16-bit arithmetic are used where they lie: autograd must not keep views of slots."""
    plain = DEMO.parent / "fp16"
    options = {"dtype": torch.float16, "cache_size": 2, "store": store}
    ids_of = [[300], [700], [900]]
    expected = gradients(offloaded(plain, dtype=torch.float16, cache_size=8), ids_of)
    assert all(torch.equal(a, b) for a, b in zip(gradients(offloaded(plain, **options), ids_of), expected))


def test_second_order_gradients_are_refused_not_wrong(offloaded):
    model = offloaded(cache_size=2, attn_implementation="eager")
    embeds = model.get_input_embeddings()(torch.tensor([[300, 700]])).detach().requires_grad_()
    loss = model(inputs_embeds=embeds).logits.logsumexp(-1).sum()
    with pytest.raises(OptionError, match="second-order gradients"):
        torch.autograd.grad(loss, embeds, create_graph=True)


def test_functional_gradients_are_refused_with_one_message(offloaded):
    """torch.func makes graphs of graphs."""
    model = offloaded(cache_size=2, attn_implementation="eager")
    embeds = model.get_input_embeddings()(torch.tensor([[300, 700]])).detach()
    with pytest.raises(OptionError, match="second-order gradients"):
        torch.func.grad(lambda of: model(inputs_embeds=of).logits.logsumexp(-1).sum())(embeds)


@pytest.fixture(scope="module")
def unrounded_reference():
    """A gradient that is a small difference of large ones shows how scales are rounded."""
    return unrounded_twin().requires_grad_(False)


@pytest.mark.both_products
@pytest.mark.parametrize("cache_size", [2, 8])
@pytest.mark.parametrize("n_tokens", [1, 5])
@pytest.mark.parametrize("also_a_norm", [False, True])
def test_a_router_learns_where_all_before_it_is_frozen(
    offloaded, reference, unrounded_reference, cache_size, n_tokens, also_a_norm
):
    """Then only the weights of its choice need gradients, not what the experts read."""
    ids, gradients = torch.tensor([[300, 700, 900, 5, 6][:n_tokens]]), []
    plain = reference if find_native()[0] is None else unrounded_reference
    for model in (offloaded(cache_size=cache_size), plain):
        trained = {
            name: parameter
            for name, parameter in model.named_parameters()
            if name.endswith("mlp.gate.weight")
            or (also_a_norm and name == "model.layers.3.input_layernorm.weight")
        }
        before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)
        model(ids).logits[0, -1].max().backward()
        gradients.append([parameter.grad.clone() for parameter in trained.values()])
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(before[name])
            parameter.grad = None
    for found, expected in zip(*gradients, strict=True):
        assert relative_error(found, expected) < limit(1e-4, 1e-2)
