"""Many sequences at once: what each gets is what it would get alone."""

import json
import random
import warnings
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mixtral_offload import ChatSession, load_tokenizer, record
from mixtral_offload.errors import OptionError
from mixtral_offload.generation.batch import GenerationRequest, generate_batch
from mixtral_offload.runtime.options import device_needs
from mixtral_offload.weights.source import DEMO


@pytest.fixture(scope="module")
def requests() -> list[GenerationRequest]:
    """32 prompts of 8 to some 60 tokens; answers end by themselves, after 1 token, or after up to 64."""
    rng, tokenizer = random.Random(0), load_tokenizer()
    lines = (DEMO.parent / "heldout.jsonl").read_text().splitlines()
    questions = [message for line in lines for message in json.loads(line)["messages"][::2]]
    ids = [GenerationRequest.chat(tokenizer, message["content"]).ids for message in rng.sample(questions, 32)]
    return [GenerationRequest(of, rng.choice((1, 3, 16, 64))) for of in ids]


@pytest.fixture(scope="module")
def alone(requests) -> list[list[int]]:
    """Each request's answer from transformers' own `generate`, everything on the device."""
    from mixtral_offload import from_pretrained

    model = from_pretrained(cache_size=8, device="cpu")
    return [greedy(model, request) for request in requests]


def greedy(model, request: GenerationRequest) -> list[int]:
    ids = torch.tensor([request.ids])
    return model.generate(ids, max_new_tokens=request.max_new_tokens, do_sample=False)[
        0, ids.shape[1] :
    ].tolist()


def by_number(answers) -> list[list[int]]:
    found = {answer.number: answer.ids for answer in answers}
    assert sorted(found) == list(range(len(found)))
    return [found[number] for number in range(len(found))]


def passes(model, monkeypatch) -> list[tuple[int, int]]:
    """Fills with (sequences, columns of the mask) of each pass."""
    seen, forward = [], model.base_model.forward

    def spy(*arguments, **named):
        seen.append(tuple(named["attention_mask"].shape))
        return forward(*arguments, **named)

    monkeypatch.setattr(model.base_model, "forward", spy)
    return seen


@pytest.mark.parametrize("cache_size", [2, 8])
@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_batch_gives_what_each_gets_alone(offloaded, requests, alone, cache_size, prefetch):
    model = offloaded(cache_size=cache_size, prefetch=prefetch, batch_size=32)
    for batch_size in (32, 5):  # all at once, and with a queue
        assert by_number(generate_batch(model, requests, batch_size=batch_size)) == alone


def test_each_needed_expert_comes_at_most_once_for_a_pass_of_a_layer(offloaded, requests):
    model, tokenizer = offloaded(cache_size=2, batch_size=32), load_tokenizer()
    with record(model, tokenizer) as run:
        by_number(generate_batch(model, requests))
    trace = run.trace
    uses = [*zip(trace.use_pass.tolist(), trace.use_layer.tolist(), trace.use_expert.tolist())]
    assert len(set(uses)) == len(uses) and trace.n_tokens > 32
    needed = {
        (p, layer, e) for p, of in zip(trace.passes, trace.experts) for layer, es in enumerate(of) for e in es
    }
    assert {*uses} == needed


def test_padding_uses_no_experts_and_is_in_no_trace(offloaded, requests, alone):
    model, some = offloaded(cache_size=8, batch_size=8), [of for of in requests if of.max_new_tokens > 3][:4]
    some = [replace(request, max_new_tokens=3) for request in some]
    assert len({len(request.ids) for request in some}) > 1
    with record(model) as run:
        found = by_number(generate_batch(model, some, batch_size=4))
    first = {tuple(request.ids): answer[:3] for request, answer in zip(requests, alone)}
    assert found == [first[tuple(request.ids)] for request in some]
    n_prompt = sum(len(request.ids) for request in some)
    assert run.trace.n_tokens == n_prompt + sum(len(answer) - 1 for answer in found)
    assert run.trace.tokens[:n_prompt].tolist() == [token for request in some for token in request.ids]
    assert model.offload.passes.current is None


def test_padding_is_forgotten_after_a_pass_that_failed(offloaded, monkeypatch):
    model, mask = offloaded(cache_size=8), torch.tensor([[0, 1, 1], [1, 1, 1]])
    monkeypatch.setattr(model.base_model.norm, "forward", lambda hidden: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(input_ids=torch.tensor([[0, 5, 6], [7, 8, 9]]), attention_mask=mask)
    assert model.offload.passes.current is None


def test_sequences_leave_and_others_are_admitted(offloaded, requests, monkeypatch):
    model = offloaded(cache_size=8, batch_size=8)
    seen = passes(model, monkeypatch)
    limits = [2, 4, 8, 16] * 4
    some = [GenerationRequest(request.ids, limit) for request, limit in zip(requests, limits)]
    answers = list(generate_batch(model, some, batch_size=8))
    rows = [n for n, _ in seen]
    assert max(rows) == 8 and sum(rows) == sum(
        len(answer.ids) for answer in answers
    )  # nothing computed for the ended
    assert len(rows) < 2 * 16  # two batches, each as long as its longest
    longest = max(len(request.ids) + request.max_new_tokens for request in some)
    assert max(columns for _, columns in seen) < longest  # columns that were padding for all are gone


def test_the_longest_sequence_takes_its_columns_with_it(offloaded, requests, alone, monkeypatch):
    story = next(request for request, answer in zip(requests, alone) if len(answer) > 6)
    model = offloaded(cache_size=8, batch_size=2)
    seen = passes(model, monkeypatch)
    list(
        generate_batch(
            model, [GenerationRequest([7] * 100, 2), GenerationRequest(story.ids, 6)], batch_size=2
        )
    )
    n = len(story.ids)
    assert [columns for _, columns in seen] == [100, 101, n + 2, n + 3, n + 4, n + 5]


def test_requests_are_taken_as_places_become_free(offloaded, requests):
    taken = []

    def lazily():
        for request in requests:
            taken.append(request)
            yield GenerationRequest(request.ids, 4)

    answers = generate_batch(offloaded(cache_size=8, batch_size=4), lazily(), batch_size=4)
    next(answers)
    assert len(taken) == 4
    assert len(list(answers)) == 31 and len(taken) == 32


def test_the_plans_kv_cache_is_never_outgrown(offloaded, requests, alone, monkeypatch):
    model = offloaded(cache_size=8, context_length=128, batch_size=2)
    seen = passes(model, monkeypatch)
    with pytest.warns(UserWarning, match=r"256 tokens holds \d of 16 sequences.*batch_size=16"):
        assert by_number(generate_batch(model, requests, batch_size=16)) == alone
    assert max(rows * columns for rows, columns in seen) <= 256 and max(rows for rows, _ in seen) > 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(generate_batch(offloaded(cache_size=8, batch_size=4), requests[:4], batch_size=4))


def test_why_an_answer_ended(offloaded, requests, alone):
    model = offloaded(cache_size=8, context_length=64)
    eos = model.generation_config.eos_token_id
    fits = next(n for n, of in enumerate(alone) if of[-1] == eos and len(requests[n].ids) + len(of) < 64)
    wanted = [
        GenerationRequest(requests[fits].ids, 64),
        GenerationRequest([5] * 10, 1),
        GenerationRequest([5] * 60, 64),
    ]
    answers = {answer.number: answer for answer in generate_batch(model, wanted, batch_size=1)}
    assert [answers[n].ended for n in range(3)] == ["complete", "max_new_tokens", "context"]
    assert answers[0].ids == alone[fits] and len(answers[2].ids) == 4


def test_sampling_depends_on_the_seed_alone(offloaded, requests):
    model = offloaded(cache_size=4, batch_size=8)
    some = [GenerationRequest(request.ids, 24, seed=number) for number, request in enumerate(requests[:8])]
    sampled = {"temperature": 1.5, "top_p": 0.95}
    together = by_number(generate_batch(model, some, batch_size=8, **sampled))
    assert together == by_number(generate_batch(model, some, batch_size=3, **sampled))
    other = [GenerationRequest(request.ids, 24, seed=request.seed + 100) for request in some]
    assert together != by_number(generate_batch(model, other, batch_size=8, **sampled))


@pytest.mark.parametrize(
    "request_",
    [GenerationRequest([]), GenerationRequest([1] * 64), GenerationRequest([1], 0)],
    ids=["empty", "long", "none"],
)
def test_what_cannot_be_answered_is_named(offloaded, request_):
    model = offloaded(cache_size=8, context_length=64)
    with pytest.raises(OptionError, match="request 1 cannot be answered"):
        list(generate_batch(model, [GenerationRequest([5], 1), request_]))


def test_an_impossible_batch_size_is_refused(offloaded):
    with pytest.raises(OptionError, match="batch_size"):
        list(generate_batch(offloaded(cache_size=8), [], batch_size=0))
    with pytest.raises(OptionError, match="batch_size"):
        offloaded(cache_size=8, batch_size=0)


def test_the_plan_leaves_room_for_every_context(offloaded):
    model = offloaded(cache_size=8, context_length=512)
    checkpoint, options = model.offload.checkpoint, model.offload.options
    one, many = (device_needs(checkpoint, replace(options, batch_size=n)) for n in (1, 8))
    config = model.config
    token_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    assert many["KV cache"] == 8 * one["KV cache"] == 8 * 512 * token_bytes


SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 32, "moe_intermediate_size": 32,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "initializer_range": 0.2,
}  # fmt: skip
OWN_SIZES = {
    "qwen3_next": {
        "layer_types": ["linear_attention", "full_attention"] * 2, "linear_num_value_heads": 4,
        "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    },
    "minimax": {"block_size": 16},
    "jamba": {
        "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 8,
        "use_mamba_kernels": False,
    },
    "gemma4_text": {
        "enable_moe_block": True, "top_k_experts": 2,
        "vocab_size_per_layer_input": 96, "hidden_size_per_layer_input": 8,
        "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
        "per_layer_config": {"03": {"head_dim": 32}},
    },
}  # fmt: skip


@pytest.mark.parametrize("model_type", ["qwen3_next", "minimax", "jamba", "gemma4_text", "mixtral"])
def test_models_that_keep_more_than_keys_and_values(model_type, offloaded, tmp_path, monkeypatch):
    """Recurrent states cannot be joined: one sequence at a time, with a warning, and the same answers."""
    try:
        config = AutoConfig.for_model(model_type)
        known = set(config.to_dict()) | set(config.attribute_map)
        sizes = {name: value for name, value in SIZES.items() if name in known}
        config = type(config)(**sizes | OWN_SIZES.get(model_type, {}))
    except (TypeError, ValueError) as error:
        pytest.skip(f"this transformers makes no {model_type} of these sizes: {type(error).__name__}")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).float().save_pretrained(tmp_path)
    model = offloaded(tmp_path, cache_size=2, context_length=64)
    some = [
        GenerationRequest([7, 8, 9], 3),
        GenerationRequest([9, 8, 7, 6, 5, 4, 3], 4),
        GenerationRequest([20, 21, 5, 7], 2),
    ]
    expected = [greedy(model, request) for request in some]
    joins = model_type in ("mixtral", "gemma4_text")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert by_number(generate_batch(model, some, batch_size=2)) == expected
    said = [str(of.message) for of in caught if "one at a time" in str(of.message)]
    assert len(said) == (not joins)
    session = ChatSession(model, load_tokenizer(), max_new_tokens=3)
    monkeypatch.setattr("mixtral_offload.generation.chat.encode", lambda *arguments: some[0].ids)
    "".join(session.send("Hi"))
    assert session.last.n_tokens == 3 and session.ended == "max_new_tokens"
    # a bound for the plan: what the attention layers leave in their cache
    past = model(torch.tensor([some[1].ids]), use_cache=True).past_key_values
    layers = past.layers if joins else []
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    planned = device_needs(model.offload.checkpoint, model.offload.options)["KV cache"]
    assert planned * len(some[1].ids) >= held * 64
    if joins:
        assert planned * len(some[1].ids) == held * 64


def test_positions_that_depend_on_the_length(offloaded, by_length):
    """In a batch, a short prompt would get the frequencies of a long one."""
    model, tokenizer = offloaded(by_length, cache_size=8, batch_size=2, context_length=128), load_tokenizer()
    texts = [
        "Tell me a story",
        "What is 12 + 30?",
        "Once upon a time there was a little dog who liked to run. " * 5,
    ]
    requests = [GenerationRequest(tokenizer(text)["input_ids"][:90], 12) for text in texts]
    assert len(requests[-1].ids) > 60
    alone = []
    for request in requests:
        alone += by_number(generate_batch(offloaded(by_length, cache_size=8), [request]))
    assert by_number(generate_batch(model, requests, batch_size=2)) == alone
