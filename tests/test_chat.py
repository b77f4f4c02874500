"""Conversations on the shipped model."""

import threading

import pytest
from transformers import DynamicCache, MixtralConfig
from transformers.cache_utils import DynamicSlidingWindowLayer

from mixtral_offload import ChatSession
from mixtral_offload.chat import _can_be_cut
from mixtral_offload.errors import CheckpointError, ConversationError, OptionError
from mixtral_offload.offload import DEMO
from mixtral_offload.terminal import notices
from mixtral_offload.tokenizer import load_tokenizer


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
    list(session.send("Tell me a story about a fox."))
    lengths = []
    session.model.model.embed_tokens.register_forward_hook(
        lambda m, args, out: lengths.append(args[0].shape[1])
    )
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


def test_the_end_of_the_context_is_said_before_it_is_hit(session):
    with pytest.raises(OptionError, match=r"(?s)longer than the model's context.*next step: clear"):
        list(session.send("hello " * 2000))
    assert session.messages == []
    session.max_new_tokens = 10_000
    ids = session._encode([{"role": "user", "content": "hello " * 400}])
    assert session._config(len(ids)).max_new_tokens == session.context_length - len(ids)


def test_counts(session):
    list(session.send("What is 2 + 2?"))
    stats = session.last
    assert stats.n_tokens > 0 and stats.hits + stats.misses > 0 and stats.tokens_per_s > 0
    assert stats.bytes_moved == stats.misses * session.model.offload.layout.n_bytes
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
    assert _can_be_cut(DynamicCache(config=session.model.config)) and _can_be_cut(DynamicCache())
    for kinds in (["sliding_attention"] * 2, ["full_attention", "sliding_attention"]):
        config = MixtralConfig(num_hidden_layers=2, sliding_window=4, layer_types=kinds)
        assert not _can_be_cut(DynamicCache(config=config))
    list(session.send("Hello!"))
    past = session._past
    assert session._reuse(session._past_ids) is past
    past.layers[2] = DynamicSlidingWindowLayer(sliding_window=4)
    assert session._reuse(session._past_ids) is not past
