"""The notebook chat without a browser (tests/test_browser.py has one): what the widgets hold, and what code can do."""

import html
import threading
import time

import numpy as np
import pytest

from mixtral_offload import load_tokenizer, record
from mixtral_offload.checkpoint import DEMO
from mixtral_offload.errors import CheckpointError
from mixtral_offload.live import expert_grid, grid_html, watch
from mixtral_offload.terminal import chat_loop
from mixtral_offload.trace import HIT, MISS, PREFETCHED
from mixtral_offload.widget import ChatWidget, bubble, open_chat

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
    monkeypatch.setattr("mixtral_offload.widget.REFRESH_S", 0)
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
    assert {look for row in grid for look in row} <= {None, "held", HIT, MISS, PREFETCHED}
    held = [sum(look is not None for look in row) for row in grid]
    assert held == [len(model.offload.cache.contents(layer)) for layer in range(6)]
    assert chat._experts.value == grid_html(model, recording)


def test_watching_leaves_the_cache_and_a_recording_alone(offloaded):
    model = offloaded(DEMO, cache_size=3)
    with watch(model) as recorder:
        assert recorder.last_pass() == [] and model.offload.recorders == (recorder,)
    assert model.offload.recorders == ()
    with record(model) as recording, watch(model) as recorder:
        assert model.offload.recorders == (recording, recorder)
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
