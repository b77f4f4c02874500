"""A pass's state belongs to the pass: threads, masks, embeddings, recordings, forks."""

import copy
import functools
import multiprocessing
import pickle
import shutil
import threading
import warnings
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, StaticCache

from mixtral_offload import (
    ChatSession,
    GenerationRequest,
    OffloadError,
    generate_batch,
    record,
)
from mixtral_offload.errors import OptionError
from mixtral_offload.weights.native import FORCE
from tests.twin import limit, relative_error

SAME = limit(2e-5)  # sums in another order


def at_once(*functions, repeats: int):
    """Call each function in a thread of its own, `repeats` times; returns the results of each, in order."""
    results, errors = [[] for _ in functions], []

    def work(number):
        try:
            for _ in range(repeats):
                results[number].append(functions[number]())
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert not errors, errors
    return results


@pytest.mark.both_products
@torch.no_grad()
def test_padded_batches_in_several_threads_give_what_each_gives_alone(offloaded, reference, batches):
    model = offloaded(cache_size=2, prefetch=2, throttle="2GB")
    alone = [model(**batch).logits for batch in batches]
    for batch, logits in zip(batches, alone):
        assert relative_error(logits, reference(**batch).logits) < SAME

    def call(batch):
        with torch.no_grad():
            return model(**batch).logits

    found = at_once(*(lambda batch=batch: call(batch) for batch in batches), repeats=15)
    assert all(torch.equal(logits, expected) for of, expected in zip(found, alone) for logits in of)


def test_a_chat_and_a_batch_at_once(offloaded, tokenizer):
    model = offloaded(cache_size=2, batch_size=8)
    texts = [
        "What is the capital of France?",
        "What is 47 + 38?",
        "Tell me a story about a girl named Sara.",
        "Hello!",
    ]

    def chat():
        return "".join(ChatSession(model, tokenizer, max_new_tokens=20).send("Tell me a story about a fox."))

    def batch():
        requests = [GenerationRequest.chat(tokenizer, text, max_new_tokens=16) for text in texts]
        return {answer.number: answer.ids for answer in generate_batch(model, requests, batch_size=3)}

    expected = chat(), batch()
    found = at_once(chat, batch, repeats=3)
    assert found == [[expected[0]] * 3, [expected[1]] * 3]


def test_each_chat_counts_what_it_has_used_itself(offloaded, tokenizer):
    model = offloaded(cache_size=2)

    def chat(text):
        session = ChatSession(model, tokenizer, max_new_tokens=12)
        "".join(session.send(text))
        return session.last

    texts = ["What is the capital of France?", "Tell me a story about a fox."]
    model.offload.stats.reset()
    found = at_once(*(lambda text=text: chat(text) for text in texts), repeats=3)
    turns = [turn for of in found for turn in of]
    assert sum(turn.cache.hits for turn in turns) == model.offload.stats.hits
    assert sum(turn.cache.misses for turn in turns) == model.offload.stats.misses
    assert sum(turn.cache.bytes_moved for turn in turns) == model.offload.stats.bytes_moved
    uses = {(turn.n_prompt, turn.n_tokens, turn.cache.hits + turn.cache.misses) for turn in turns}
    assert len(uses) == 2  # the uses of a turn do not depend on who else is there


def test_no_lock_is_held_while_a_streamer_is_called(offloaded, tokenizer):
    """A streamer that waits for another thread's whole generation: under a lock, neither would ever go on."""
    model = offloaded(cache_size=2)
    ids = tokenizer("What is the capital of France?", return_tensors="pt").input_ids
    others = []

    def generate(n_tokens, **options):
        length = {"max_new_tokens": n_tokens, "min_new_tokens": n_tokens}
        return model.generate(ids, do_sample=False, **length, **options)

    class Waiting:
        def put(self, value):
            thread = threading.Thread(target=lambda: others.append(generate(2)))
            thread.start()
            thread.join(60)
            assert not thread.is_alive()

        def end(self):
            pass

    generate(3, streamer=Waiting())
    assert len(others) == 4 and all(torch.equal(others[0], other) for other in others)


@torch.no_grad()
def test_an_interrupted_pass_leaves_nothing_behind(offloaded, batches, monkeypatch):
    model, batch = offloaded(cache_size=2, prefetch=2, throttle="2GB"), batches[0]
    expected = model(**batch).logits

    def interrupted(hidden):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(model.base_model.norm, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model(**batch)
    assert model.offload.passes.current is None
    # from another thread: a lock left behind would stop it for ever
    assert all(
        torch.equal(logits, expected) for logits in at_once(lambda: _logits(model, batch), repeats=1)[0]
    )


def _logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


@pytest.mark.both_products
@pytest.mark.parametrize(
    "options", [{"cache_size": 2, "prefetch": 2, "throttle": "2GB"}, {"dequantize_on_load": True}]
)
@pytest.mark.parametrize("kind", ["int", "bool", "float"])
@pytest.mark.parametrize("n_more", [3, 12])
@pytest.mark.parametrize("skips", [False, True])
@torch.no_grad()
def test_masks_longer_than_the_pass(offloaded, reference, batches, options, kind, n_more, skips):
    """A static KV cache's mask has a column for each position; later columns mean nothing for this pass."""
    model = offloaded(**options)
    how = model.offload.passes.without_padding if skips else nullcontext
    for batch in batches:
        slots = batch["input_ids"].shape[1] + n_more
        mask = torch.zeros(
            2, slots, dtype={"int": torch.long, "bool": torch.bool, "float": torch.float32}[kind]
        )
        width = batch["input_ids"].shape[1]
        mask[:, :width] = batch["attention_mask"]
        step = torch.tensor([[300], [700]])
        found, expected = [], []
        for run, of in ((model, found), (reference, expected)):
            past = StaticCache(config=run.config, max_cache_len=slots)
            longer = mask.clone()
            longer[:, width] = 1
            with how():
                of.append(run(batch["input_ids"], attention_mask=mask, past_key_values=past).logits)
                of.append(run(step, attention_mask=longer, past_key_values=past).logits)
        read = batch["attention_mask"].bool() if skips else slice(None)
        assert relative_error(found[0][read], expected[0][read]) < SAME
        assert relative_error(found[1], expected[1]) < SAME


@pytest.mark.both_products
@pytest.mark.parametrize("skips", [False, True])
@torch.no_grad()
def test_a_second_pass_of_several_tokens_takes_its_own_columns(offloaded, reference, batches, skips):
    """Chunked prefill: the second chunk's mask has columns of the first one, its own, and later positions."""
    model, batch, slots = offloaded(cache_size=2), batches[0], 24
    width = batch["input_ids"].shape[1]
    mask = torch.zeros(2, slots, dtype=torch.long)
    mask[:, :width] = batch["attention_mask"]
    assert not mask[:, width // 2 : width].all() or not mask[:, : width // 2].all()
    logits = []
    for run in (model, reference):
        past, parts = StaticCache(config=run.config, max_cache_len=slots), []
        with model.offload.passes.without_padding() if skips else nullcontext():
            for part in batch["input_ids"].split(width // 2, dim=1):
                parts.append(run(part, attention_mask=mask, past_key_values=past).logits)
        logits.append(torch.cat(parts, dim=1))
    read = batch["attention_mask"].bool() if skips else slice(None)
    assert relative_error(logits[0][read], logits[1][read]) < SAME


@torch.no_grad()
def test_other_masks_and_positions(offloaded, reference, batches, monkeypatch):
    monkeypatch.setenv(FORCE, "none")  # a router is nearly undecided here: any rounding may tip it
    model, ids = offloaded(cache_size=2, prefetch=2, throttle="2GB"), batches[0]["input_ids"]
    n, width = ids.shape
    causal = torch.full((width, width), torch.finfo(torch.float32).min).triu(1).expand(n, 1, width, width)
    dead = torch.ones(n, width, dtype=torch.long)
    dead[1] = 0  # a row that is padding as a whole
    cases = {
        "4-D": {"attention_mask": causal},
        "4-D bool": {"attention_mask": causal == 0},
        "positions alone": {"position_ids": torch.arange(width).flip(0).expand(n, -1)},
        "shorter than the pass": {"attention_mask": torch.ones(n, width - 2, dtype=torch.long)},
        "a dead row": {"attention_mask": dead},
        "all dead": {"attention_mask": torch.zeros(n, width, dtype=torch.long)},
    }
    for name, case in cases.items():
        found, expected = model(ids, **case).logits, reference(ids, **case).logits
        assert relative_error(found, expected) < 2e-5, name


@pytest.mark.both_products
@torch.no_grad()
def test_a_loss_over_padding_is_the_twins(offloaded, reference, batches):
    """Labels that forget to leave out padding: whatever that is worth, it is what transformers computes."""
    model = offloaded(cache_size=2)
    for batch in batches:
        of_model, of_reference = (run(**batch, labels=batch["input_ids"]) for run in (model, reference))
        assert of_model.loss.item() == pytest.approx(of_reference.loss.item(), rel=limit(1e-5))
        assert relative_error(of_model.logits, of_reference.logits) < SAME


@pytest.mark.both_products
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_what_generate_returns_of_padding_is_the_twins(offloaded, reference, tokenizer, side):
    """Answers after padding on the right, and hidden states, show what experts make of padding."""
    model, texts = offloaded(cache_size=2), ["Once upon a time there was a fox who", "12 + 7 ="]
    batch = tokenizer(texts, padding=True, padding_side=side, return_tensors="pt")
    padding = batch["attention_mask"] == 0
    batch["input_ids"][padding] = torch.arange(300, 300 + int(padding.sum()))
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    for extra in ({"output_scores": True}, {"output_hidden_states": True}, {"output_logits": True}):
        found, expected = (run.generate(**batch, **options, **extra) for run in (model, reference))
        assert torch.equal(found.sequences, expected.sequences), extra
        for name in ("scores", "logits"):
            for a, b in zip(found.get(name) or (), expected.get(name) or (), strict=True):
                finite = b.isfinite()
                assert relative_error(a[finite], b[finite]) < SAME
        for a, b in zip(found.get("hidden_states") or (), expected.get("hidden_states") or (), strict=True):
            assert all(relative_error(*of) < SAME for of in zip(a, b, strict=True))


def _keep_output(kept, module, inputs, output):
    kept.append(output)


@pytest.mark.both_products
@torch.no_grad()
def test_what_a_pass_leaves_of_padding_is_the_twins(offloaded, reference, batches):
    """Its keys and values, and what hooks see: somebody may read them, whatever logits were asked for."""
    model = offloaded(cache_size=2)
    for batch in batches:
        seen, pasts, nexts = [], [], []
        for run in (model, reference):
            hook = run.model.layers[4].register_forward_hook(functools.partial(_keep_output, seen))
            output = run(**batch, logits_to_keep=1, use_cache=True)
            hook.remove()
            pasts.append([(layer.keys, layer.values) for layer in output.past_key_values.layers])
            nexts.append(run(torch.tensor([[300], [700]]), past_key_values=output.past_key_values).logits)
        assert relative_error(*seen) < SAME and relative_error(*nexts) < SAME
        for found, expected in zip(*pasts, strict=True):
            assert all(relative_error(*of) < SAME for of in zip(found, expected, strict=True))


@torch.no_grad()
def test_embeddings_in_place_of_ids(offloaded, reference, tokenizer, batches):
    model = offloaded(cache_size=2, prefetch=2, throttle="2GB")
    for batch in batches:
        embeds, mask = model.get_input_embeddings()(batch["input_ids"]), batch["attention_mask"]
        assert torch.equal(model(inputs_embeds=embeds, attention_mask=mask).logits, model(**batch).logits)
        assert torch.equal(
            model(input_ids=None, inputs_embeds=embeds, attention_mask=mask).logits, model(**batch).logits
        )
    ids = tokenizer("What is the capital of France?", return_tensors="pt").input_ids
    embeds = model.get_input_embeddings()(ids)
    length = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    new = model.generate(inputs_embeds=embeds, **length)
    assert torch.equal(new, reference.generate(ids, **length)[:, ids.shape[1] :])
    model.offload.stats.reset()
    model(inputs_embeds=embeds)
    assert model.offload.stats.predictions > 0  # the first layer's experts are predicted from the embeddings


def test_embeddings_are_recorded_without_ids(offloaded, tokenizer):
    model = offloaded(cache_size=2)
    ids = tokenizer("What is the capital of France?", return_tensors="pt").input_ids
    with torch.no_grad(), record(model, tokenizer) as run:
        embeds = model.get_input_embeddings()(ids)  # outside of a pass: recorded nowhere
        model(inputs_embeds=embeds)
        model(ids)
    n = ids.shape[1]
    assert run.trace.tokens.tolist() == [-1] * n + ids[0].tolist()
    assert run.trace.pieces[:n] == [""] * n
    assert (run.trace.experts[:n] == run.trace.experts[n:]).all()


def test_a_recording_of_two_threads_replays_exactly(offloaded, batches):
    from mixtral_offload.analysis.replay import replay

    model = offloaded(cache_size=3, prefetch=2, throttle="2GB")
    with record(model) as run:
        at_once(*(lambda batch=batch: _logits(model, batch) for batch in batches), repeats=4)
    trace, stats = run.trace, model.offload.stats
    assert trace.n_tokens == 4 * sum(batch["input_ids"].numel() for batch in batches)
    replay = replay(trace)
    assert (replay.hits, replay.misses) == (stats.hits, stats.misses)
    # each pass's tokens are those of one batch, whole
    wanted = [batch["input_ids"].flatten().tolist() for batch in batches]
    found = [trace.tokens[trace.passes == number].tolist() for number in range(trace.passes.max() + 1)]
    assert sorted(found) == sorted(wanted * 4)


def test_a_second_recording_is_refused(offloaded, batches):
    model = offloaded(cache_size=3)
    with record(model) as outer:
        _logits(model, batches[0])
        with pytest.raises(OptionError, match="being recorded already"), record(model):
            pass
        _logits(model, batches[1])
    assert outer.trace.n_tokens == sum(batch["input_ids"].numel() for batch in batches[:2])
    with record(model) as again:
        _logits(model, batches[0])
    assert again.trace.n_tokens == batches[0]["input_ids"].numel()


def _is_exact(trace, model):
    from mixtral_offload.analysis.replay import replay

    replay, stats = replay(trace), model.offload.stats
    assert (replay.hits, replay.misses) == (stats.hits, stats.misses)
    assert len(trace.use_pass) == stats.hits + stats.misses


def test_a_trace_that_no_replay_can_repeat_says_so(offloaded):
    model, ids = offloaded(cache_size=2), torch.tensor([[300, 700, 900]])
    experts = model.model.layers[1].mlp.experts
    with pytest.warns(UserWarning, match="outside of passes of the whole model"), record(model):
        with torch.no_grad():
            experts(torch.randn(1, 192), torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.5]]))
        _logits(model, {"input_ids": ids})

    def inner(module, inputs):
        handle.remove()
        model(ids + 1)

    handle = model.model.layers[2].register_forward_pre_hook(inner)
    with pytest.warns(UserWarning, match="a pass ran inside of another one"), record(model):
        _logits(model, {"input_ids": ids})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with record(model) as run:
            _logits(model, {"input_ids": ids})
            _logits(model, {"input_ids": ids + 1})
    _is_exact(run.trace, model)


@pytest.mark.parametrize("options", [{}, {"prefetch": 2, "throttle": "2GB"}, {"shared_slots": True}])
def test_an_interrupted_pass_is_not_credited_to_the_next(offloaded, monkeypatch, options):
    model, ids = offloaded(cache_size=2, **options), torch.tensor([[300, 700, 900, 5]])

    def interrupted(*args):
        raise KeyboardInterrupt

    with pytest.warns(UserWarning, match="1 of 3 passes did not run to their end"), record(model) as run:
        _logits(model, {"input_ids": ids})
        with monkeypatch.context() as patch:
            patch.setattr(model.base_model.layers[3].mlp.gate, "forward", interrupted)
            with pytest.raises(KeyboardInterrupt):
                _logits(model, {"input_ids": ids + 1})
        _logits(model, {"input_ids": ids + 2})
    trace = run.trace
    assert trace.n_passes == 2 and trace.settings["interrupted_passes"] == 1
    assert trace.tokens.tolist() == [*ids[0].tolist(), *(ids[0] + 2).tolist()]
    uses = [*zip(trace.use_pass.tolist(), trace.use_layer.tolist(), trace.use_expert.tolist())]
    needed = {
        (number, layer, expert)
        for number, of in zip(trace.passes, trace.experts)
        for layer, experts in enumerate(of)
        for expert in experts
    }
    assert len(uses) == len({*uses}) and {*uses} == needed


@pytest.mark.parametrize("copier", [copy.deepcopy, pickle.dumps])
@pytest.mark.parametrize("options", [{}, {"prefetch": 2, "throttle": "2GB"}])
def test_copies_are_refused_with_one_message(offloaded, copier, options):
    model = offloaded(cache_size=2, **options)
    for part in (model, model.model, model.offload):
        with pytest.raises(OptionError, match="cannot be copied or pickled"):
            copier(part)


def test_weights_that_are_not_there_say_so(offloaded, batches):
    model = offloaded(cache_size=2)
    for name in ("eager", "grouped_mm", "batched_mm"):
        model.set_experts_implementation(name)
        with pytest.raises(OffloadError, match="experts' weights as parameters"):
            _logits(model, batches[0])
    model.set_experts_implementation("offloaded")
    _logits(model, batches[0])


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork on this system")
@pytest.mark.parametrize("options", [
    {"cache_size": 2}, {"cache_size": 3, "store": "disk"},
    {"cache_size": 2, "prefetch": 2, "throttle": "500MB"},
])  # fmt: skip
def test_a_forked_child_continues_and_leaves_its_parent_alone(offloaded, tokenizer, options):
    model, context = offloaded(**options), multiprocessing.get_context("fork")
    prompts = [
        tokenizer(text, return_tensors="pt").input_ids
        for text in ("What is the capital of France?", "Tell me about")
    ]

    def answers():
        return [
            model.generate(ids, max_new_tokens=12, min_new_tokens=12, do_sample=False).tolist()
            for ids in prompts
        ]

    def child(queue):
        queue.put(answers())

    expected, queue = answers(), context.Queue()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forks while threads run
        children = [context.Process(target=child, args=(queue,)) for _ in range(2)]
        for process in children:
            process.start()
    assert answers() == expected  # while the children fill slots of their own
    assert [queue.get(timeout=120) for _ in children] == [expected] * 2
    for process in children:
        process.join(30)
        assert process.exitcode == 0
    assert answers() == expected


@pytest.mark.both_products
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler here")
@torch.no_grad()
def test_a_compiled_model_gives_the_same_answers(offloaded):
    model, ids = offloaded(cache_size=2), torch.tensor([[300, 700, 900, 5]])
    expected = model(ids).logits
    compiled = torch.compile(model)
    assert relative_error(compiled(ids).logits, expected) < limit(1e-5)


def test_a_model_of_transformers_with_our_configuration_says_what_to_do(offloaded):
    other = AutoModelForCausalLM.from_config(offloaded(cache_size=2).config)
    with pytest.raises(OptionError, match="was not built by mixtral_offload"):
        other(torch.tensor([[1, 2, 3]]))


def test_adapters_of_experts_are_refused(offloaded):
    """As peft leaves them: its configuration on the model, and nothing in the experts."""
    model, ids = offloaded(cache_size=2), torch.tensor([[300, 700]])
    for part in (model, model.model):
        part.peft_config = {"default": SimpleNamespace(target_modules={"q_proj"}, target_parameters=None)}
        _logits(model, {"input_ids": ids})
        part.peft_config["other"] = SimpleNamespace(target_parameters={"mlp.experts.gate_up_proj"})
        with pytest.raises(OptionError, match="changes experts"):
            _logits(model, {"input_ids": ids})
        part.peft_config["other"] = SimpleNamespace(modules_to_save=["lm_head", "self_attn.v_proj"])
        with pytest.raises(OptionError, match="whose weight is quantized"):
            _logits(model, {"input_ids": ids})
        del part.peft_config


def test_a_pass_without_a_middle_layer_loses_no_other(offloaded):
    """The whole recording ended in an error of numpy."""
    model, ids = offloaded(cache_size=3), torch.tensor([[300, 700, 900, 5]])

    class Skip(torch.nn.Module):
        def forward(self, hidden, *args, **kwargs):
            return hidden

    with pytest.warns(UserWarning, match="1 of 3 passes did not run"), record(model) as run:
        _logits(model, {"input_ids": ids})
        layer, model.model.layers[1] = model.model.layers[1], Skip()
        _logits(model, {"input_ids": ids})
        model.model.layers[1] = layer
        _logits(model, {"input_ids": ids + 1})
    assert run.trace.n_passes == 2 and run.trace.tokens.tolist() == [*ids[0].tolist(), *(ids[0] + 1).tolist()]
