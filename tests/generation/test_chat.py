"""Conversations on the shipped model."""

import contextlib
import gc
import multiprocessing
import os
import threading
import warnings
import weakref

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, MixtralConfig
from transformers.cache_utils import DynamicSlidingWindowLayer

from mixtral_offload import ChatSession
from mixtral_offload.apps.terminal import notices
from mixtral_offload.errors import CheckpointError, ConversationError, OptionError
from mixtral_offload.generation.tokenizer import load_tokenizer
from mixtral_offload.generation.turn_cache import can_be_cut, model_state
from mixtral_offload.weights.source import DEMO


@pytest.fixture
def session(offloaded):
    return ChatSession(offloaded(DEMO, cache_size=3), load_tokenizer(DEMO), max_new_tokens=80)


def fresh_answer(session, messages) -> str:
    """What transformers' plain generate says to the same messages, without streaming or a kept KV cache."""
    prompt = session.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids = session.model.generate(**prompt, max_new_tokens=80, do_sample=False)
    return session.tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def test_answers_stream_and_the_conversation_is_kept(session):
    for text in ("My name is Ana.", "What is 12 + 30?", "What is my name?"):
        before = [*session.messages, {"role": "user", "content": text}]
        pieces = list(session.send(text))
        assert len(pieces) > 1
        assert session.messages[:-1] == before
        assert session.messages[-1] == {"role": "assistant", "content": "".join(pieces).strip()}
        assert session.messages[-1]["content"] == fresh_answer(session, before)
    assert "Ana" in session.messages[-1]["content"]


def test_the_kept_kv_cache_is_used(session):
    lengths = []
    session.model.model.embed_tokens.register_forward_hook(
        lambda m, args, out: lengths.append(args[0].shape[1])
    )
    list(session.send("Tell me a story about a fox."))
    lengths.clear()
    list(session.send("Thank you!"))
    n_prompt = len(session.tokenizer("Thank you!")["input_ids"])
    assert lengths[0] < n_prompt + 20  # not the whole conversation again


def test_stop_keeps_what_was_said_and_the_session(session):
    pieces = []
    for piece in session.send("Tell me a story about a fox."):
        pieces.append(piece)
        if len(pieces) == 5:
            session.stop()
    assert session.last.n_tokens < 60
    assert session.messages[-1]["content"] == "".join(pieces).strip()
    answer = "".join(session.send("What is 2 + 2?"))
    assert answer.strip() == fresh_answer(session, session.messages[:-1])


def test_a_reader_that_goes_away_stops_the_answer(session):
    answer = session.send("Tell me a story about a fox.")
    first = next(answer)
    answer.close()
    assert session.messages[-1]["content"] == first.strip()
    assert session.last.n_tokens < 60


def test_an_error_leaves_the_conversation_as_it_was(session, monkeypatch):
    list(session.send("Hello!"))
    before = list(session.messages)
    store, good = session.model.offload.cache.store, session.model.offload.cache.store.pieces
    store.pieces = lambda expert: (_ for _ in ()).throw(OSError("the disk is gone"))
    with pytest.raises(CheckpointError, match="the disk is gone"):
        list(session.send("What is the capital of France?"))
    assert session.messages == before
    store.pieces = good
    answer = "".join(session.send("What is the capital of France?"))
    assert answer.strip() == fresh_answer(session, session.messages[:-1])


def test_seed_makes_sampling_repeatable(session):
    session.temperature = 1.5
    answers = []
    for seed in (1, 1, 2):
        session.clear()
        session.seed = seed
        answers.append("".join(session.send("Tell me a story.")))
    assert answers[0] == answers[1] != answers[2]


def test_a_prompt_longer_than_the_context_is_refused(session, monkeypatch):
    with pytest.raises(OptionError, match=r"(?s)longer than the model's context.*next step: clear"):
        list(session.send("hello " * 2000))
    assert session.messages == []
    limits = []

    def spy(**settings):
        limits.append(settings["max_new_tokens"])
        return GenerationConfig(**settings)

    monkeypatch.setattr("mixtral_offload.generation.chat.GenerationConfig", spy)
    session.max_new_tokens = 10_000
    next(session.send("hello " * 400))
    assert limits == [session.context_length - session.last.n_prompt]


def test_counts(session):
    list(session.send("What is 2 + 2?"))
    stats = session.last
    assert stats.n_tokens > 0 and stats.cache.hits + stats.cache.misses > 0 and stats.tokens_per_s > 0
    assert stats.cache.bytes_moved == stats.cache.misses * session.model.offload.layout.n_bytes
    list(session.send("What is 2 + 3?"))
    assert session.total.n_tokens == stats.n_tokens + session.last.n_tokens


def test_interrupts_while_an_answer_is_being_stopped_do_not_leave_it_running(session, monkeypatch):
    """A second Ctrl-C once ended the process while the first one was waiting for the model."""
    answer = session.send("Tell me a story about a fox.")
    next(answer)
    join, interrupts = threading.Thread.join, iter([True, True, False])

    def interrupted(thread, *arguments):
        if next(interrupts, False):
            raise KeyboardInterrupt
        return join(thread, *arguments)

    monkeypatch.setattr(threading.Thread, "join", interrupted)
    with pytest.raises(KeyboardInterrupt):
        answer.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "generate"]
    monkeypatch.undo()
    assert "4" in "".join(session.send("What is 2 + 2?"))


def test_an_interrupt_before_the_first_piece_leaves_nothing_running(session, monkeypatch):
    start = threading.Thread.start

    def interrupted(thread):
        start(thread)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(session.send("Tell me a story about a fox."))
    monkeypatch.undo()
    assert not [thread for thread in threading.enumerate() if thread.name == "generate"]
    assert "4" in "".join(session.send("What is 2 + 2?"))


def test_a_tokenizer_that_fails_does_not_leave_the_reader_waiting(session, monkeypatch):
    monkeypatch.setattr(
        session.tokenizer, "decode", lambda *a, **k: (_ for _ in ()).throw(ValueError("no such token"))
    )
    with pytest.raises(ConversationError, match="no such token"):
        list(session.send("Hello!"))


def test_a_chat_goes_no_further_than_the_memory_that_was_planned(offloaded):
    session = ChatSession(offloaded(cache_size=2, context_length=64), load_tokenizer(DEMO))
    assert session.context_length == 64
    with pytest.raises(OptionError, match="less than 64 tokens"):
        list(session.send("hello " * 100))


def test_regenerate_answers_the_same_message_again(session):
    list(session.send("Hello!"))
    list(session.send("Tell me a story about a fox."))
    before = list(session.messages)
    list(session.regenerate())
    assert session.messages == before  # greedy
    session.temperature, session.seed = 1.5, 1
    list(session.regenerate())
    assert session.messages[:-1] == before[:-1] and session.messages[-1] != before[-1]


def test_edit_takes_the_place_of_the_last_message(session):
    list(session.send("My name is Ana."))
    list(session.send("What is 2 + 2?"))
    answer = "".join(session.edit("What is my name?"))
    assert [m["content"] for m in session.messages[::2]] == ["My name is Ana.", "What is my name?"]
    assert answer.strip() == session.messages[-1]["content"] == fresh_answer(session, session.messages[:-1])


def test_nothing_to_regenerate_or_to_edit(session):
    for ask in (session.regenerate, lambda: session.edit("Hello!")):
        with pytest.raises(OptionError, match="no message yet"):
            list(ask())


def test_an_answer_says_why_it_ended(session):
    list(session.send("What is 2 + 2?"))
    assert session.ended == "complete"
    for _ in session.send("Tell me a story about a fox."):
        session.stop()
    assert session.ended == "stopped"
    session.max_new_tokens = 5
    list(session.regenerate())
    assert session.ended == "max_new_tokens" and session.last.n_tokens == 5
    assert "cut at 5 tokens" in notices(session)[0]


def test_a_full_context_is_announced_before_it_cuts_an_answer(offloaded):
    session = ChatSession(offloaded(cache_size=2, context_length=64), load_tokenizer(DEMO))
    list(session.send("What is 2 + 2?"))
    assert notices(session) == []
    list(session.send("What is the capital of France?"))
    assert notices(session) == []
    list(session.send("Hello!"))
    left = 64 - session.context_used
    assert notices(session) == [
        f"{left} of 64 tokens of context are left; clearing the conversation frees them"
    ]
    list(session.edit("Tell me a story about a fox."))
    assert session.ended == "context" and session.context_used == 64
    assert notices(session) == ["cut: the context is full; clear the conversation"]


def test_counters_move_while_an_answer_comes(session):
    seen = [session.last.n_tokens for _ in session.send("Tell me a story about a fox.")]
    assert seen[0] < seen[-1] <= session.last.n_tokens
    assert session.context_used == session.last.n_prompt + session.last.n_tokens
    session.clear()
    assert session.context_used == 0


def test_a_system_prompt_and_settings_count_from_the_next_answer_on(session):
    list(session.send("Hello!"))
    plain = session.last.n_prompt
    session.system_prompt = "You are a pirate."
    list(session.regenerate())
    assert session.last.n_prompt > plain
    session.temperature = -1
    with pytest.raises(OptionError, match="temperature"):
        list(session.send("Hello!"))
    assert len(session.messages) == 2


def test_a_kept_cache_is_cut_only_where_every_layer_keeps_everything(session):
    """A layer with a sliding window or a recurrent state has forgotten what a shorter prompt would need."""
    assert can_be_cut(DynamicCache(config=session.model.config)) and can_be_cut(DynamicCache())
    for kinds in (["sliding_attention"] * 2, ["full_attention", "sliding_attention"]):
        config = MixtralConfig(num_hidden_layers=2, sliding_window=4, layer_types=kinds)
        assert not can_be_cut(DynamicCache(config=config))
    list(session.send("Hello!"))
    past = session.turn_cache.past
    assert session.turn_cache.reuse(session.model, session.turn_cache.ids) is past
    past.layers[2] = DynamicSlidingWindowLayer(sliding_window=4)
    assert session.turn_cache.reuse(session.model, session.turn_cache.ids) is not past


@pytest.mark.parametrize("other", ["send", "regenerate", "edit"])
def test_one_answer_comes_at_a_time(session, other):
    list(session.send("Hello!"))
    expected = fresh_answer(
        session, [*session.messages, {"role": "user", "content": "Tell me a story about a fox."}]
    )
    texts = [] if other == "regenerate" else ["What is 2 + 2?"]
    answer, errors = session.send("Tell me a story about a fox."), []
    first = next(answer)

    def ask():
        with pytest.raises(OptionError, match="an answer is still coming") as caught:
            next(getattr(session, other)(*texts))
        errors.append(str(caught.value))

    ask()
    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert len(errors) == 2 and all("stop()" in text for text in errors)
    assert (first + "".join(answer)).strip() == expected, "it was disturbed"
    assert [m["content"] for m in session.messages[2:]] == ["Tell me a story about a fox.", expected]
    list(getattr(session, other)(*texts))
    assert len(session.messages) == (6 if other == "send" else 4)


def test_answers_asked_for_before_and_begun_after_each_other_are_all_kept(session):
    answers = [session.send(text) for text in ("My name is Ana.", "What is my name?")]
    for answer in answers:
        list(answer)
    assert [m["content"] for m in session.messages[::2]] == ["My name is Ana.", "What is my name?"]
    assert "Ana" in session.messages[-1]["content"]


def test_a_stopped_answer_makes_room_for_the_next_one(session):
    story = session.send("Tell me a story about a fox.")
    first = next(story)
    session.stop()
    answer = "".join(session.send("What is 2 + 2?"))
    assert session.messages[:2] == [
        {"role": "user", "content": "Tell me a story about a fox."},
        {"role": "assistant", "content": first.strip()},
    ]
    assert session.messages[3]["content"] == answer.strip() == fresh_answer(session, session.messages[:-1])
    before = list(session.messages)
    assert list(story) == [], "what is not kept is not streamed"
    assert session.messages == before


class Reader:
    """Part of a cycle: what it holds is freed where Python happens to look for cycles."""

    def __init__(self, answer):
        self.answer, self.itself = answer, self


@pytest.mark.parametrize("where", ["its own worker", "a pass of another thread", "under the lock", "here"])
def test_a_reader_that_is_collected_frees_the_session(session, where):
    reader = Reader(session.send("Tell me a story about a fox."))
    first, ids = next(reader.answer), torch.tensor([[5, 6]])
    (worker,) = (thread for thread in threading.enumerate() if thread.name == "generate")
    done = threading.Event()

    def collect(*arguments):
        is_worker = threading.current_thread() is worker
        if dropped.is_set() and not done.is_set() and is_worker == (where == "its own worker"):
            gc.collect()
            done.set()

    dropped, hook = threading.Event(), session.model.model.embed_tokens.register_forward_hook(collect)
    del reader
    dropped.set()
    if where in ("here", "under the lock"):
        with session.lock if where == "under the lock" else contextlib.nullcontext():
            collect()
    other = threading.Thread(target=lambda: session.model(ids), daemon=True)
    if where == "a pass of another thread":
        other.start()
        other.join(60)
    assert done.wait(60), "a deadlock"
    hook.remove()
    worker.join(60)
    assert session.messages[1]["content"].startswith(first.strip()) and session.last.n_tokens < 60
    assert "4" in "".join(session.send("What is 2 + 2?")) and len(session.messages) == 4


def test_clear_during_an_answer_forgets_it_too(session):
    list(session.send("My name is Ana."))
    n_before = session.total.n_tokens
    pieces = []
    for piece in session.send("Tell me a story about a fox."):
        pieces.append(piece)
        if len(pieces) == 3:
            session.clear()
    assert len(pieces) == 3
    assert session.messages == [] and session.context_used == 0 and session.ended is None
    assert session.turn_cache.past is None and session.turn_cache.ids == []
    assert n_before < session.total.n_tokens < n_before + 60
    answer = "".join(session.send("What is 2 + 2?"))
    assert answer.strip() == fresh_answer(session, session.messages[:-1]) and len(session.messages) == 2


def test_another_answer_may_begin_right_after_clear(session):
    story = session.send("Tell me a story about a fox.")
    next(story)
    session.clear()
    answer = "".join(session.send("What is 2 + 2?"))
    assert list(story) == []
    assert [m["content"] for m in session.messages] == ["What is 2 + 2?", answer.strip()]
    assert answer.strip() == fresh_answer(session, session.messages[:-1])


def test_what_is_assigned_during_an_answer_counts(session):
    saved = [{"role": "user", "content": "My name is Ana."}, {"role": "assistant", "content": "Hello, Ana!"}]
    for _ in session.send("Tell me a story about a fox."):
        session.messages = list(saved)
    assert session.messages == saved
    assert "Ana" in "".join(session.send("What is my name?"))
    assert session.messages[-1]["content"] == fresh_answer(session, session.messages[:-1])
    session.clear()
    session.max_new_tokens = 12
    list(session.send("Tell me a story about a fox."))
    plain, n_prompt = list(session.messages), session.last.n_prompt
    session.clear()
    for _ in session.send("Tell me a story about a fox."):
        session.system_prompt, session.max_new_tokens, session.temperature = "You are a pirate.", 500, -1.0
    assert session.messages == plain and session.ended == "max_new_tokens"
    session.temperature = 0.0
    session.clear()
    list(session.send("Tell me a story about a fox."))
    assert session.last.n_prompt > n_prompt


def test_an_error_leaves_how_the_last_answer_ended(session):
    session.max_new_tokens = 5
    list(session.send("Tell me a story about a fox."))
    session.model.offload.cache.store.pieces = lambda expert: (_ for _ in ()).throw(
        OSError("the disk is gone")
    )
    with pytest.raises(CheckpointError):
        list(session.send("What is the capital of France?"))
    session.max_new_tokens = 80
    assert notices(session) == ["cut at 5 tokens, the longest answer allowed"]


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork on this system")
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_forked_child_goes_on_with_the_chat(session, temperature):
    """Forked while the parent's thread runs the model, and holds its locks."""
    session.temperature, session.seed = temperature, 1
    context, parent, go = multiprocessing.get_context("fork"), os.getpid(), threading.Event()
    list(session.send("My name is Ana."))
    before, ended = list(session.messages), session.ended
    inside = threading.Event()

    def wait(*arguments):
        if os.getpid() == parent:
            inside.set()
            go.wait(60)

    def child(queue):
        found = [list(session.messages) == before, session.ended == ended]
        try:
            next(story)
        except OptionError as error:
            found.append("parent" in str(error))
        answers = ["".join(session.send(text)) for text in ("What is my name?", "What is 2 + 2?")]
        queue.put((found, answers, list(session.messages)))

    story, queue = session.send("Tell me a story about a fox."), context.Queue()
    first = next(story)
    hook = session.model.model.embed_tokens.register_forward_hook(wait)
    assert inside.wait(60)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forks while threads run
        process = context.Process(target=child, args=(queue,))
        process.start()
    try:
        found, answers, messages = queue.get(timeout=60)
        process.join(30)
    finally:
        process.kill()
        go.set()
        hook.remove()
    assert found == [True] * 3 and process.exitcode == 0
    assert messages[:2] == before and [m["content"] for m in messages[3::2]] == [a.strip() for a in answers]
    if temperature == 0:
        assert answers[0].strip() == fresh_answer(session, messages[:3])
    text = first + "".join(story)
    assert session.messages == [*before, session.messages[2], {"role": "assistant", "content": text.strip()}]


def test_a_dropped_session_is_freed(offloaded):
    session = ChatSession(offloaded(DEMO, cache_size=3), load_tokenizer(DEMO), max_new_tokens=4)
    list(session.send("Hello!"))
    weak = weakref.ref(session)
    del session
    gc.collect()
    assert weak() is None


def _trained(model):
    model.get_parameter("model.layers.0.input_layernorm.weight").mul_(-1)


def _new_data(model):
    weight = model.get_parameter("model.layers.0.input_layernorm.weight")
    weight.data = -weight.data


def _hooked(model):
    model.model.layers[1].register_forward_hook(lambda module, inputs, output: output * 1.5)


def _buffer(model):
    model.model.rotary_emb.inv_freq.mul_(0.5)


def _inference(model):
    with torch.inference_mode():
        model.model.norm.weight = torch.nn.Parameter(-model.model.norm.weight, requires_grad=False)


def _stepped(model):
    """A fused optimizer changes tensors without counting."""
    weight = model.get_parameter("model.layers.0.input_layernorm.weight").requires_grad_()
    with torch.enable_grad():
        weight.grad = torch.ones_like(weight)
        torch.optim.SGD([weight], lr=2.0, fused=True).step()


@pytest.mark.parametrize(
    "change", [_trained, _new_data, _hooked, _buffer, _stepped, _inference, lambda model: model.bfloat16()]
)
def test_a_model_changed_between_turns_answers_as_in_a_fresh_session(offloaded, change):
    """The KV cache of earlier turns is of another model then."""
    tokenizer = load_tokenizer()

    def turns(session, *texts):
        return ["".join(session.send(text)) for text in texts]

    model = offloaded(cache_size=8)
    session = ChatSession(model, tokenizer, max_new_tokens=12)
    turns(session, "What is the capital of France?")
    with torch.no_grad():
        change(model)
    fresh = ChatSession(model, tokenizer, max_new_tokens=12)
    fresh.messages = list(session.messages)
    assert turns(session, "And of Japan?") == turns(fresh, "And of Japan?")
    assert session.turn_cache.ids == fresh.turn_cache.ids
    for layer, expected in zip(session.turn_cache.past.layers, fresh.turn_cache.past.layers):
        assert torch.equal(layer.keys, expected.keys) and torch.equal(layer.values, expected.values)


def test_another_hook_in_place_of_one_is_a_change(offloaded):
    model = offloaded(cache_size=8)
    handle = model.model.layers[0].register_forward_hook(lambda module, inputs, output: output)
    session = ChatSession(model, load_tokenizer(), max_new_tokens=12)
    "".join(session.send("What is the capital of France?"))
    handle.remove()
    _hooked(model)
    fresh = ChatSession(model, session.tokenizer, max_new_tokens=12)
    fresh.messages = list(session.messages)
    assert "".join(session.send("And of Japan?")) == "".join(fresh.send("And of Japan?"))
    assert torch.equal(session.turn_cache.past.layers[1].keys, fresh.turn_cache.past.layers[1].keys)


def test_a_model_built_in_inference_mode_keeps_its_kv_cache(offloaded):
    with torch.inference_mode():
        model = offloaded(cache_size=3)
    session = ChatSession(model, load_tokenizer(), max_new_tokens=4)
    "".join(session.send("Hello!"))
    assert session.turn_cache.state == model_state(model)


def test_positions_that_depend_on_the_length(offloaded, by_length):
    """The keys of a short conversation differ from those of a longer one.

    The fresh session has a model of its own: it would change the frequencies of a shared one.
    """
    models = [offloaded(by_length, cache_size=8, context_length=256) for _ in range(2)]
    tokenizer = load_tokenizer()
    session = ChatSession(models[0], tokenizer, max_new_tokens=12)
    lengths = []
    for text in (
        "Hello!",
        "Tell me a story about a fox and a bird.",
        "And then?",
        "What is 2 + 3?",
        "Thank you!",
    ):
        if text == "Thank you!":
            session.messages = session.messages[:2]
        fresh = ChatSession(models[1], tokenizer, max_new_tokens=12)
        fresh.messages = list(session.messages)
        assert "".join(session.send(text)) == "".join(fresh.send(text))
        assert torch.equal(session.turn_cache.past.layers[0].keys, fresh.turn_cache.past.layers[0].keys)
        lengths.append(session.turn_cache.past.get_seq_length())
    assert min(lengths) < 48 < max(lengths)


def test_another_model_takes_a_conversation_over(offloaded):
    tokenizer, models = load_tokenizer(), [offloaded(cache_size=8) for _ in range(2)]
    session = ChatSession(models[0], tokenizer, max_new_tokens=12)
    "".join(session.send("What is the capital of France?"))
    session.model = models[1]
    assert (
        session.turn_cache.reuse(models[1], [1, 2, 3, *session.turn_cache.ids]) is not session.turn_cache.past
    )
    assert session.turn_cache.state[0] == id(models[0])


@pytest.mark.parametrize("text", [None, 5, b"Hi", ["Hi"]])
def test_what_is_no_text_is_no_message(offloaded, text):
    session = ChatSession(offloaded(cache_size=8), load_tokenizer(), max_new_tokens=3)
    with pytest.raises(OptionError, match="not a message"):
        session.send(text)
    for messages in (
        None,
        "Hi",
        ["Hi"],
        [{"content": "Hi"}],
        [{"role": 5, "content": "Hi"}],
        [{"role": "user"}],
    ):
        with pytest.raises(OptionError, match="not a conversation"):
            session.messages = messages
