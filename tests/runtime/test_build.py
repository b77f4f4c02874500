"""The shipped model: no cache size, store or option changes a single bit of an answer."""

import gc
import threading
import weakref

import pytest
import torch
from transformers import MixtralForCausalLM

from mixtral_offload import from_pretrained
from mixtral_offload.errors import OptionError
from mixtral_offload.generation.tokenizer import load_tokenizer
from mixtral_offload.weights.hqq import dequantize
from mixtral_offload.weights.source import DEMO
from tests.twin import limit, same_experts

PROMPTS = [
    "Hello!", "What is 23 + 48?", "What is 9 times 7?", "What is the capital of France?",
    "Tell me a story about a fox.", "How do I reverse a list in Python?",
    "How do you say thank you in Spanish?", "What comes after Tuesday?", "What are you?",
    "My name is Ana. What is my name?", "What is the opposite of hot?", "Bonjour!", "Tell me a joke.",
    "Is 14 even or odd?", "Which continent is Kenya in?", "How do I read a file in Python?",
    "What does a cow say?", "Sort these numbers: 5, 2, 9", "What is an expert cache?",
    "Who won the game last night?",
]  # fmt: skip
CASES = [(size, store) for size in range(2, 8) for store in ("ram", "disk")]
ONE_BY_ONE = [
    (2, "disk"),
    (3, "ram"),
    (6, "ram"),
]  # the other cases generate all prompts in one batch: it is faster


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(DEMO)


@pytest.fixture(scope="module")
def prompts(tokenizer):
    how = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    return [tokenizer.apply_chat_template([{"role": "user", "content": text}], **how) for text in PROMPTS]


@torch.no_grad()
def logits_of(model, prompts):
    return [model(**prompt).logits for prompt in prompts]


def greedy_of(model, inputs):
    return model.generate(**inputs, max_new_tokens=64, min_new_tokens=64, do_sample=False)


@pytest.fixture(scope="module")
def batch(tokenizer):
    """All prompts, padded on the left."""
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
        )
        for text in PROMPTS
    ]
    return tokenizer(
        texts,
        padding=True,
        padding_side="left",
        add_special_tokens=False,
        return_tensors="pt",
        return_token_type_ids=False,
    )


@pytest.fixture(scope="module")
def resident(prompts, batch):
    """Logits, and 64 greedy tokens of all prompts one by one and in a batch, with all experts resident."""
    from mixtral_offload import from_pretrained

    model = from_pretrained(DEMO, device="cpu", cache_size=8)
    assert model.offload.plan.store is None
    return (
        logits_of(model, prompts),
        [greedy_of(model, prompt) for prompt in prompts],
        greedy_of(model, batch),
    )


@pytest.mark.parametrize("cache_size, store", CASES)
def test_every_cache_size_and_store_gives_the_same_bits(
    offloaded, prompts, batch, resident, cache_size, store
):
    model = offloaded(DEMO, cache_size=cache_size, store=store)
    assert model.offload.plan.store == store
    assert all(torch.equal(a, b) for a, b in zip(logits_of(model, prompts), resident[0]))
    assert torch.equal(greedy_of(model, batch), resident[2])
    if (cache_size, store) in ONE_BY_ONE:
        assert all(torch.equal(greedy_of(model, a), b) for a, b in zip(prompts, resident[1]))
    assert model.offload.stats.misses > 0


@pytest.mark.both_products
@torch.no_grad()
def test_the_same_as_plain_transformers_on_the_dequantized_weights(offloaded, prompts):
    model = offloaded(DEMO, cache_size=2)
    plain = plain_model(model)
    with same_experts(model, plain):
        for prompt in prompts:
            found = model(**prompt).logits
            assert (plain(**prompt).logits - found).abs().max() < limit(1e-3, 5e-2)


def plain_model(model) -> MixtralForCausalLM:
    """The naive twin: transformers' own Mixtral, its fp32 weights dequantized from the same checkpoint."""
    checkpoint = model.offload.checkpoint
    plain = MixtralForCausalLM(checkpoint.config).eval()
    for name, parameter in model.named_parameters():
        plain.get_parameter(name).data.copy_(parameter)
    for name, module in model.named_modules():
        if hasattr(module, "quantization"):
            fields = {field: getattr(module, buffer) for field, buffer in module._names.items()}
            shape = (module.out_features, module.in_features)
            plain.get_parameter(f"{name}.weight").data.copy_(dequantize(fields, shape, module.quantization))
    layout = checkpoint.layout
    buffer = torch.empty(layout.n_bytes, dtype=torch.uint8)
    for layer, expert in checkpoint.experts:
        checkpoint.read_expert((layer, expert), buffer)
        views = layout.views(buffer)
        gate, up, down = (
            dequantize(views[m], layout.shapes[m], layout.quantization[m]) for m in ("gate", "up", "down")
        )
        experts = plain.model.layers[layer].mlp.experts
        experts.gate_up_proj.data[expert].copy_(torch.cat((gate, up)))
        experts.down_proj.data[expert].copy_(down)
    return plain


def test_batches_equal_one_by_one(offloaded, tokenizer):
    """Left-padded rows share experts; each row's tokens must not notice the others."""
    model = offloaded(DEMO, cache_size=2)
    texts = [PROMPTS[1], PROMPTS[4], PROMPTS[0]]
    messages = [[{"role": "user", "content": text}] for text in texts]
    options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    tokenizer.padding_side = "left"
    batch = tokenizer.apply_chat_template(messages, padding=True, **options)
    together = model.generate(**batch, max_new_tokens=24, do_sample=False)[:, batch["input_ids"].shape[1] :]
    for row, message in zip(together, messages):
        alone = tokenizer.apply_chat_template(message, **options)
        answer = model.generate(**alone, max_new_tokens=24, do_sample=False)[0, alone["input_ids"].shape[1] :]
        assert tokenizer.decode(row, skip_special_tokens=True) == tokenizer.decode(
            answer, skip_special_tokens=True
        )


def test_two_threads_may_generate_at_once(offloaded, prompts, resident):
    model = offloaded(DEMO, cache_size=2)
    answers = {}

    def run(i):
        answers[i] = model.generate(**prompts[i], max_new_tokens=64, min_new_tokens=64, do_sample=False)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(answers[i], resident[1][i]) for i in range(2))


def test_half_precision_and_a_throttle_change_no_bit_either(offloaded, prompts):
    outputs = []
    for options in (
        {"cache_size": 8},
        {"cache_size": 2, "throttle": "500MB"},
        {"cache_size": 3, "store": "disk"},
    ):
        model = offloaded(DEMO, dtype="bfloat16", **options)
        outputs.append(logits_of(model, prompts[:4]))
    assert all(torch.equal(a, b) for other in outputs[1:] for a, b in zip(outputs[0], other))


def test_the_16_bit_original_runs_too(offloaded, prompts, resident):
    """The model before quantization ships as well; 4 bits must stay near it."""
    model = offloaded(DEMO.parent / "fp16", cache_size=2)
    for logits, quantized in zip(logits_of(model, prompts[:5]), resident[0]):
        top, other = logits[0, -1].softmax(-1), quantized[0, -1].softmax(-1)
        assert (top - other).abs().sum() < 0.5


def test_no_expert_parameters_exist_outside_the_cache(offloaded):
    model = offloaded(DEMO, cache_size=2)
    assert not [name for name, _ in model.named_parameters() if ".experts." in name]
    places = model.offload.checkpoint.places.values()
    assert {place.name for place in places if place.field is None} == {
        name for name, _ in model.named_parameters()
    }


@pytest.mark.parametrize("prefetch", [0, 2])
@torch.no_grad()
def test_a_dropped_model_gives_its_memory_back_at_once(prompts, prefetch):
    """Without a garbage collection: the next model may need the memory."""
    from mixtral_offload import from_pretrained

    model = from_pretrained(DEMO, device="cpu", cache_size=2, prefetch=prefetch)
    model(**prompts[0])
    cache, store = weakref.ref(model.offload.cache), weakref.ref(model.offload.cache.store)
    gc.collect()
    gc.disable()
    try:
        del model
        assert cache() is None and store() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("store", ["ram", "disk"])
@torch.no_grad()
def test_close_ends_all_threads_and_may_be_called_twice(prompts, store):
    def own_threads():  # not tqdm's
        return {thread for thread in threading.enumerate() if thread.name.startswith("expert-")} - before

    before = set(threading.enumerate())
    model = from_pretrained(DEMO, device="cpu", cache_size=2, store=store, prefetch=2)
    model(**prompts[0])
    if store == "disk":  # the shipped model's experts are too small for reading threads
        model.offload.cache.store.pool.submit(int).result()
    started = {thread.name.partition("_")[0] for thread in own_threads()}
    assert started == ({"expert-copies"} if store == "ram" else {"expert-copies", "expert-reads"})
    model.offload.close()
    assert not own_threads()
    model.offload.close()


@pytest.mark.parametrize("options", [{"cache_size": 2}, {"cache_size": 8}, {"dequantize_on_load": True}])
def test_a_closed_model_refuses_every_pass(options):
    model = from_pretrained(device="cpu", **options)
    model.offload.close()
    with pytest.raises(OptionError, match=r"(?s)was closed.*from_pretrained"):
        model(torch.ones(1, 2, dtype=torch.long))


@pytest.mark.parametrize(
    "name, value",
    [
        *((name, None) for name in ("context_length", "batch_size", "look_ahead")),
        *((name, "no") for name in ("shared_slots", "progress")),
        ("policy", ["lru"]),
        ("device", [1]),
        ("device", 1.5),
    ],
)
def test_values_of_a_wrong_type_are_refused(name, value):
    with pytest.raises(OptionError, match=name):
        from_pretrained(**{"device": "cpu", name: value})
