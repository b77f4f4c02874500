"""The notebook chat without a browser (tests/apps/test_browser.py has one): values, and use from code."""

import html
import threading
import time

import numpy as np
import pytest

from mixtral_offload import load_tokenizer, record
from mixtral_offload.apps.expert_map import expert_grid, grid_html, watch
from mixtral_offload.apps.terminal import chat_loop
from mixtral_offload.apps.widget import ChatWidget, bubble, open_chat
from mixtral_offload.core.trace import HIT, MISS, PREFETCHED
from mixtral_offload.errors import CheckpointError, OptionError
from mixtral_offload.generation.chat import TurnStats
from mixtral_offload.runtime.settings import check_sampling
from mixtral_offload.weights.source import DEMO

EVIL = '<img src=x onerror="window.hacked=1"><script>window.hacked=1</script>'


@pytest.fixture
def chat(offloaded):
    return ChatWidget(offloaded(DEMO, cache_size=3, prefetch=2), load_tokenizer(DEMO), max_new_tokens=80)


def wait(chat):
    chat._thread.join(60)
    assert not chat.busy


def test_enter_and_the_button_send_and_the_answer_is_shown(chat):
    for act in (lambda: chat._input._submission_callbacks(chat._input), chat._send_button.click):
        chat._input.value = "What is the capital of France?"
        act()
        assert chat._input.value == ""
        wait(chat)
    assert chat._text.value.count("Paris") == 2
    assert "tokens/s" in chat._status.value and "context" in chat._status.value


def test_the_answer_is_shown_while_it_comes_and_stop_ends_it(chat, monkeypatch):
    monkeypatch.setattr("mixtral_offload.apps.widget.REFRESH_S", 0)
    shown, more = [], threading.Event()
    chat._text.observe(lambda change: (shown.append(change["new"]), len(shown) == 8 and more.set()), "value")
    chat._input.value = "Tell me a story about a fox."
    chat._send()
    assert not chat._stop_button.disabled and chat._send_button.disabled
    assert more.wait(60)
    chat._stop_button.click()
    wait(chat)
    texts = [text for text in shown if "mo-assistant" in text]
    assert len(texts) >= 6 and all(a in b for a, b in zip([t[:-10] for t in texts], texts[1:]))
    assert chat.session.ended == "stopped" and chat.session.last.n_tokens < 60
    assert "stopped" in chat._status.value and chat._stop_button.disabled


def test_regenerate_edit_and_clear(chat):
    chat.ask("My name is Ana.")
    chat.ask("What is 2 + 2?")
    chat._again.click()
    wait(chat)
    assert len(chat.session.messages) == 4
    chat._edit.click()
    assert chat._input.value == "What is 2 + 2?" and chat._send_button.description == "Resend"
    chat._input.value = "What is my name?"
    chat._send_button.click()
    wait(chat)
    assert len(chat.session.messages) == 4 and "Ana" in chat.session.messages[-1]["content"]
    assert chat._send_button.description == "Send"
    chat._clear.click()
    assert chat.session.messages == [] and "Nothing said yet" in chat._text.value


def test_clear_while_an_answer_comes(chat):
    chat._input.value = "Tell me a story about a fox."
    chat._send()
    while not chat.session.last.n_tokens:
        time.sleep(0.01)
    chat.clear()
    assert not chat.busy and chat.session.messages == [] and "fox" not in chat._text.value


def test_settings_reach_the_session(chat):
    fields = chat._fields
    fields["system_prompt"].value, fields["temperature"].value = "You are a pirate.", 1.2
    fields["max_new_tokens"].value, fields["seed"].value = 7, "0"
    first = chat.ask("Tell me a story.")
    session = chat.session
    assert (session.system_prompt, session.temperature, session.seed) == ("You are a pirate.", 1.2, 0)
    assert session.last.n_tokens == 7
    chat.clear()
    fields["seed"].value = "1"
    chat.ask("Tell me a story.")
    chat.clear()
    fields["seed"].value = "0"
    assert chat.ask("Tell me a story.") == first  # the same seed, the same answer


def test_what_goes_wrong_is_shown_and_the_conversation_goes_on(chat, monkeypatch):
    chat.ask("Hello!")
    chat._fields["seed"].value = "seven"
    with pytest.raises(ValueError, match="seven"):
        chat.ask("Hello!")
    assert "seven" in chat._text.value and len(chat.session.messages) == 2
    chat._fields["seed"].value = ""
    store = chat.session.model.offload.cache.store
    good, store.pieces = store.pieces, lambda expert: (_ for _ in ()).throw(OSError(EVIL))
    with pytest.raises(CheckpointError):
        chat.ask("What is the capital of Peru?")
    assert html.escape(EVIL) in chat._text.value and EVIL not in chat._text.value
    store.pieces = good
    assert "Paris" in chat.ask("What is the capital of France?")
    assert "cannot read the experts" not in chat._text.value


def test_nothing_that_is_said_becomes_html(chat):
    assert EVIL not in bubble("user", EVIL) and html.escape(EVIL) in bubble("user", EVIL)
    chat.session.messages = [{"role": "user", "content": EVIL}, {"role": "assistant", "content": EVIL}]
    chat.refresh()
    assert EVIL not in chat._text.value and chat._text.value.count(html.escape(EVIL)) == 2


def test_the_grid_is_what_the_trace_says(chat):
    model, session = chat.session.model, chat.session
    with record(model, session.tokenizer) as recording:
        chat.ask("What is 12 + 30?")
        uses, grid = recording.last_pass(), expert_grid(model, recording)
    trace = recording.trace
    for layer, of_layer in enumerate(uses):
        assert sorted(of_layer) == sorted(trace.experts[-1, layer].tolist())
        assert [of_layer[e] for e in trace.experts[-1, layer].tolist()] == trace.outcomes()[
            -1, layer
        ].tolist()
    assert {state for row in grid for state in row} <= {None, "cached", HIT, MISS, PREFETCHED}
    held = [sum(look is not None for look in row) for row in grid]
    assert held == [len(model.offload.cache.contents(layer)) for layer in range(6)]
    assert chat._experts.value == grid_html(model, recording)


def test_watching_leaves_the_cache_and_a_recording_alone(offloaded):
    model = offloaded(DEMO, cache_size=3)
    with watch(model) as recorder:
        assert recorder.last_pass() == [] and [*model.offload.observers] == [recorder]
    assert not len(model.offload.observers)
    with record(model) as recording, watch(model) as recorder:
        assert [*model.offload.observers] == [recording, recorder]
    assert np.array_equal(recording.trace.tokens, [])


def test_the_picture_where_there_are_no_widgets_is_the_conversation_as_text(chat):
    chat.ask("What is the capital of France?")
    bundle = chat._repr_mimebundle_()
    assert bundle["application/vnd.jupyter.widget-view+json"]["model_id"] == chat.box.model_id
    assert (
        "user> What is the capital of France?\n\nassistant> The capital of France is Paris."
        in bundle["text/plain"]
    )


def test_without_a_notebook_the_chat_is_text(offloaded, monkeypatch, capsys):
    lines = iter(["What is the capital of France?", "/again", "/clear", "/exit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert open_chat(offloaded(DEMO, cache_size=3), load_tokenizer(DEMO)) is None
    out, err = capsys.readouterr()
    assert out.count("The capital of France is Paris.") == 2 and "tokens/s" in err


def test_in_the_text_loop_an_error_does_not_end_the_conversation(chat, monkeypatch, capsys):
    lines = iter(["/again", "hello " * 2000, "What is the capital of France?"])

    def read(prompt):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    chat_loop(chat.session)
    out, err = capsys.readouterr()
    assert "no message yet" in err and "longer than the model's context" in err and "Paris" in out


@pytest.fixture
def gated(chat, monkeypatch):
    """A widget with one question and answer, which answers when `gate` opens, or fails halfway if `fail`."""
    session = chat.session
    session.messages = [{"role": "user", "content": "old"}, {"role": "assistant", "content": "answer to old"}]
    chat.gate, chat.fail, stop = threading.Event(), False, threading.Event()

    def answer(conversation):
        messages = conversation()
        check_sampling(session.max_new_tokens, session.temperature, session.top_p, session.seed)
        if len(messages[-1]["content"]) > 1000:
            raise OptionError("the conversation is longer than the model's context")
        stop.clear()
        session.last, session.ended = TurnStats(n_prompt=1), None
        yield "answer"
        while not (chat.gate.is_set() or stop.is_set()):
            time.sleep(0.002)
        if chat.fail:
            raise OSError("the disk is gone")
        yield f" to {messages[-1]['content']}"
        session.ended = "stopped" if stop.is_set() else "complete"
        session.messages = [
            *messages,
            {"role": "assistant", "content": f"answer to {messages[-1]['content']}"},
        ]

    monkeypatch.setattr(session, "_answer", answer)
    monkeypatch.setattr(session, "stop", stop.set)
    chat.refresh()
    yield chat
    chat.gate.set()
    if chat._thread is not None:
        chat._thread.join(60)


def type_and_send(chat, text="new"):
    chat._input.value = text
    chat._send_button.click()


def said(chat):
    return [m["content"] for m in chat.session.messages if m["role"] == "user"]


def buttons(chat):
    """What a user can press, by the names on the buttons."""
    every = (chat._send_button, chat._stop_button, chat._again, chat._edit, chat._clear)
    return {button.description for button in every if not button.disabled}


def idle(chat):
    pass


def empty(chat):
    chat.clear()


def drafting(chat):
    chat._input.value = "draft"


def editing(chat):
    chat._edit.click()


def changed(chat):
    chat._input.value = "draft"
    chat._edit.click()
    chat._input.value = "changed"


def answering(chat):
    type_and_send(chat, "new")


def answering_and_typing(chat):
    type_and_send(chat, "new")
    chat._input.value = "next"


def failed(chat):
    chat.fail = True
    chat.gate.set()
    type_and_send(chat, "new")
    wait(chat)
    chat.fail = False


STATES = {
    idle: ({"Send", "Regenerate", "Edit last", "Clear"}, ""),
    empty: ({"Send", "Clear"}, ""),
    drafting: ({"Send", "Regenerate", "Edit last", "Clear"}, "draft"),
    editing: ({"Resend", "Cancel edit", "Clear"}, "old"),
    changed: ({"Resend", "Cancel edit", "Clear"}, "changed"),
    answering: ({"Stop", "Clear"}, ""),
    answering_and_typing: ({"Stop", "Clear"}, "next"),
    failed: ({"Send", "Regenerate", "Edit last", "Clear"}, "new"),
}


def enter(chat):
    chat._input._submission_callbacks(chat._input)


def ask(chat):
    threading.Timer(0.05, chat.gate.set).start()
    return chat.ask("from code")


ACTIONS = {
    "Enter": enter,
    "Send": lambda chat: chat._send_button.click(),
    "Stop": lambda chat: chat._stop_button.click(),
    "Regenerate": lambda chat: chat._again.click(),
    "Edit": lambda chat: chat._edit.click(),
    "Clear": lambda chat: chat._clear.click(),
    "ask": ask,
    "refresh": lambda chat: chat.refresh(),
    "bad seed": lambda chat: setattr(chat._fields["seed"], "value", "seven") or enter(chat),
}
#: (state, action) -> (the user's messages, the field) after the answer; "busy" where it raises OptionError
SENT = {
    idle: (["old"], ""),
    empty: ([], ""),
    drafting: (["old", "draft"], ""),
    editing: (["old"], ""),
    changed: (["changed"], "draft"),
    answering: (["old", "new"], ""),
    answering_and_typing: (["old", "new"], "next"),
    failed: (["old", "new"], ""),
}
SAME = {
    idle: (["old"], ""),
    empty: ([], ""),
    drafting: (["old"], "draft"),
    editing: (["old"], "old"),
    changed: (["old"], "changed"),
    answering: (["old", "new"], ""),
    answering_and_typing: (["old", "new"], "next"),
    failed: (["old"], "new"),
}
AFTER = {
    "Enter": SENT,
    "Send": SENT,
    "Stop": SAME,
    "Regenerate": SAME,
    "refresh": SAME,
    "bad seed": SAME,
    "Edit": {
        **SAME,
        idle: (["old"], "old"),
        drafting: (["old"], "old"),
        editing: (["old"], ""),
        changed: (["old"], "draft"),
        failed: (["old"], "old"),
    },
    "Clear": {**{state: ([], field) for state, (_, field) in SAME.items()}, editing: ([], "")},
    "ask": {
        idle: (["old", "from code"], ""),
        empty: (["from code"], ""),
        drafting: (["old", "from code"], "draft"),
        editing: (["old", "from code"], ""),
        changed: (["old", "from code"], "changed"),
        answering: "busy",
        answering_and_typing: "busy",
        failed: (["old", "from code"], "new"),
    },
}


@pytest.mark.parametrize("state", STATES, ids=lambda state: state.__name__)
@pytest.mark.parametrize("action", ACTIONS)
def test_every_action_in_every_state(gated, state, action):
    chat = gated
    state(chat)
    assert (buttons(chat), chat._input.value) == STATES[state]
    expected = AFTER[action][state]
    if expected == "busy":
        with pytest.raises(OptionError, match="an answer is coming already"):
            ACTIONS[action](chat)
        expected = SAME[state]
    elif action == "ask":
        assert ACTIONS[action](chat) == "answer to from code"
    else:
        ACTIONS[action](chat)
    if action not in ("Stop", "Clear"):  # these end an answer themselves
        chat.gate.set()
    if chat._thread is not None:
        wait(chat)
    assert (said(chat), chat._input.value) == expected
    assert [m["role"] for m in chat.session.messages] == ["user", "assistant"] * len(said(chat))
    if action == "bad seed" and state in (idle, empty, drafting, editing, changed, failed) and SAME[state][1]:
        assert "impossible seed" in chat._text.value
    chat._fields["seed"].value = ""
    chat.gate.set()
    type_and_send(chat, "afterwards")  # the conversation goes on in any case
    wait(chat)
    assert said(chat)[-1] == "afterwards" and "mo-error" not in chat._text.value
    assert "Stop" not in buttons(chat) and "Send" in buttons(chat)


@pytest.mark.parametrize("begin", [drafting, editing, changed])
@pytest.mark.parametrize("trouble", ["too long", "bad seed", "seed of 70 bits", "halfway"])
def test_what_could_not_be_sent_comes_back_with_the_reason(gated, begin, trouble):
    chat = gated
    begin(chat)
    if trouble == "too long":
        chat._input.value = "long " * 300
    elif trouble == "halfway":
        chat.fail = True
    else:
        chat._fields["seed"].value = "seven" if trouble == "bad seed" else str(2**70)
    chat.gate.set()
    typed, names, seed = chat._input.value, buttons(chat), chat.session.seed
    enter(chat)
    wait(chat)
    reasons = {"too long": "longer than the model", "halfway": "the disk is gone"}
    assert reasons.get(trouble, "impossible seed") in chat._text.value
    assert (chat._input.value, buttons(chat), said(chat), chat.session.seed) == (typed, names, ["old"], seed)
    chat.fail, chat._fields["seed"].value = False, ""
    if trouble == "too long":
        chat._input.value = typed = "short"
    enter(chat)
    wait(chat)
    assert said(chat) == (["old", typed] if begin is drafting else [typed])


def test_a_text_that_fails_while_another_is_typed_is_shown(gated):
    chat = gated
    chat.fail = True
    type_and_send(chat, "first")
    chat._input.value = "second"
    chat.gate.set()
    wait(chat)
    assert (
        chat._input.value == "second"
        and bubble("user", "first") in chat._text.value
        and "the disk is gone" in chat._text.value
    )
    chat.fail = False
    enter(chat)
    wait(chat)
    assert said(chat) == ["old", "second"] and bubble("user", "first") not in chat._text.value


def test_a_stop_before_the_answer_has_begun_is_not_lost(gated, monkeypatch):
    """The session makes a new event for each answer: one that was set before is forgotten."""
    chat, began, go = gated, threading.Event(), threading.Event()
    read = chat._read_settings
    monkeypatch.setattr(chat, "_read_settings", lambda: (began.set(), go.wait(10), read()))
    type_and_send(chat)
    assert began.wait(10)
    chat._stop_button.click()
    go.set()
    wait(chat)  # the gate is still closed
    assert chat.session.ended == "stopped" and said(chat) == ["old", "new"]


def test_clear_from_another_thread_while_code_waits_for_an_answer(gated):
    """JupyterLab handles the buttons on a thread of its own, while a cell runs."""
    chat = gated
    for _ in range(20):
        clicks = threading.Timer(0.01, chat._clear.click)
        clicks.start()
        assert chat.ask("hello") == "answer to hello"
        clicks.join()
        assert chat.session.messages == [] and "Nothing said yet" in chat._text.value and not chat.busy


def test_a_thread_that_cannot_be_started(gated, monkeypatch):
    chat = gated

    def refuse(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(RuntimeError):
        chat.ask("hello")
    monkeypatch.undo()
    assert not chat.busy and "Send" in buttons(chat)


def test_an_interrupted_ask_ends_the_answer(gated, monkeypatch):
    chat, join = gated, threading.Thread.join

    def interrupted(thread, *arguments):
        monkeypatch.setattr(threading.Thread, "join", join)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "join", interrupted)
    with pytest.raises(KeyboardInterrupt):
        chat.ask("hello")
    wait(chat)
    assert chat.session.ended == "stopped" and said(chat) == ["old", "hello"]


def test_the_text_loop_waits_its_turn(gated, monkeypatch):
    chat = gated
    type_and_send(chat)
    with pytest.raises(OptionError, match="an answer is coming already"):
        chat.loop()
    chat.gate.set()
    wait(chat)
    lines = iter(["in the loop", "/exit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    chat.loop()
    assert said(chat)[-1] == "in the loop" and "in the loop" in chat._text.value


def test_text_that_acts_on_a_terminal_or_reorders_is_shown(chat):
    evil = "a\x1b[2Jb\u202ecba\x00"
    chat.session.messages = [{"role": "user", "content": evil}, {"role": "assistant", "content": evil}]
    chat.refresh()
    for shown in (chat._text.value, repr(chat)):
        assert shown.count("a\\x1b[2Jb\\u202ecba\\x00") == 2 and not set("\x1b\u202e\x00") & set(shown)


def test_a_session_cleared_from_code_during_an_answer(chat, monkeypatch):
    """The answer is what was streamed; that the conversation is empty by then is no error."""
    monkeypatch.setattr("mixtral_offload.apps.widget.REFRESH_S", 0)
    chat._text.observe(lambda _: chat.session.last.n_tokens > 8 and chat.session.clear(), "value")
    answer = chat.ask("Tell me a story about a fox.")
    assert answer and chat.session.messages == [] and chat._error is None
    assert "Nothing said yet" in chat._text.value
