"""The chat in a notebook: ipywidgets (7.7 and 8) over a ChatSession; untrusted text is escaped.

Answers are made on a thread of their own, so that the kernel stays free for the Stop button.
"""

from __future__ import annotations

import html
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import ipywidgets as w
from transformers import PreTrainedTokenizerBase

from mixtral_offload.analysis.recorder import Recorder
from mixtral_offload.apps.expert_map import grid_html, watch
from mixtral_offload.apps.terminal import chat_loop, notices
from mixtral_offload.errors import OptionError, describe
from mixtral_offload.generation.chat import ChatSession
from mixtral_offload.runtime.offload import OffloadedModel
from mixtral_offload.runtime.settings import check_sampling
from mixtral_offload.system.safe_text import visible

Message = dict[str, str]  #: as `ChatSession.messages` has them
Ask = Callable[..., Iterator[str]]  #: `send`, `regenerate` or `edit` of the session

REFRESH_S = 0.08  # between two pictures of an answer that comes
BUBBLE = (
    "white-space:pre-wrap;overflow-wrap:anywhere;padding:6px 10px;margin:4px 0;border-radius:8px;"
    "line-height:1.4;color:#111"
)
COLOURS = {
    "user": "background:#dbe9f6;margin-left:18%",
    "assistant": "background:#f1f1f1;margin-right:18%",
    "error": "background:#fbe3d6;border-left:4px solid #8A2F00",
}
WIDE = w.Layout(width="auto", flex="1 1 auto")


def bubble(kind: str, text: str) -> str:
    """Draw one message as HTML; markup in it is shown as text."""
    return f'<div class="mo-{kind}" style="{BUBBLE};{COLOURS[kind]}">{html.escape(visible(text))}</div>'


@dataclass
class _Result:
    """The result of one answer."""

    answer: str = ""
    error: Exception | None = None


class ChatWidget:
    """A conversation with buttons, live counters and the experts at work.

    Display it as the last expression of a cell, or use it from code (`ask`). Two states are independent:
    idle or answering, and editing the last message or not. Typed text is never lost: if it cannot be
    answered, it returns to the field, and the reason is shown.

    Args:
        settings: As `ChatSession` takes them.

    Attributes:
        session: The conversation.
        box: The widget.
    """

    def __init__(self, model: OffloadedModel, tokenizer: PreTrainedTokenizerBase, **settings: Any):
        self.session = ChatSession(model, tokenizer, **settings)
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._unsent: str | None = None  # text without an answer, if the field holds other text by now
        self._edited: str | None = None  # the message that is being edited
        self._draft = ""  # what was in the field before
        self._state, self._answering = threading.Lock(), False
        self._stopping = threading.Event()
        self._make_chat()
        self._make_settings()
        experts = w.VBox([self._experts, self._status])
        self.box = w.VBox([self._log, self._row, self._buttons, experts, self._settings])
        self.box.layout.max_width = "760px"
        self.box.add_class("mo-chat")
        self.refresh()

    def _make_chat(self) -> None:
        self._text, self._status, self._experts = w.HTML(), w.HTML(), w.HTML()
        # a reversed column keeps its end in sight while it grows
        layout = w.Layout(display="flex", flex_flow="column-reverse", height="340px", overflow="auto")
        layout.border, layout.padding = "1px solid #ccc", "4px"
        self._log = w.Box([self._text], layout=layout)
        self._text.layout.flex = "0 0 auto"
        self._input = w.Text(placeholder="Write a message, press Enter", layout=WIDE)
        with warnings.catch_warnings():  # the only event for Enter alone in both 7.7 and 8
            warnings.simplefilter("ignore", DeprecationWarning)
            self._input.on_submit(lambda _: self._send())
        self._send_button = self._button("Send", self._send, "primary")
        self._stop_button = self._button("Stop", self.stop, "danger")
        self._row = w.HBox([self._input, self._send_button, self._stop_button])
        self._again = self._button("Regenerate", self._regenerate)
        self._edit = self._button("Edit last", self._edit_or_cancel)
        self._clear = self._button("Clear", self.clear)
        self._buttons = w.HBox([self._again, self._edit, self._clear])

    @staticmethod
    def _button(name: str, act: Callable[[], None], style: str = "") -> w.Button:
        button = w.Button(description=name, button_style=style, layout=w.Layout(width="auto"))
        button.on_click(lambda _: act())
        return button

    def _make_settings(self) -> None:
        session, style = self.session, {"description_width": "110px"}
        seed = "" if session.seed is None else str(session.seed)
        self._fields = {
            "system_prompt": w.Textarea(session.system_prompt or ""),
            "temperature": w.FloatSlider(session.temperature, min=0, max=2, step=0.05),
            "top_p": w.FloatSlider(session.top_p, min=0.05, max=1, step=0.05),
            "max_new_tokens": w.BoundedIntText(session.max_new_tokens, min=1, max=10**6),
            "seed": w.Text(seed, placeholder="a number, for answers that repeat"),
        }
        names = ("system prompt", "temperature", "top-p", "max tokens", "seed")
        for name, field in zip(names, self._fields.values()):
            field.description, field.style, field.layout.width = name, style, "460px"
        self._settings = w.Accordion([w.VBox([*self._fields.values()])], selected_index=None)
        self._settings.set_title(0, "Settings (temperature 0 always takes the likeliest token)")

    def _read_settings(self) -> None:
        """Set the session's settings from the fields; raise OptionError and set none if one is impossible."""
        values = {name: field.value for name, field in self._fields.items()}
        system_prompt, text = values.pop("system_prompt"), values["seed"].strip()
        try:
            values["seed"] = int(text) if text else None
        except ValueError:
            expected, hint = "a whole number, or nothing", "change it under Settings"
            raise OptionError("impossible seed", expected=expected, found=text, hint=hint) from None
        check_sampling(**values)
        session = self.session
        session.system_prompt = system_prompt or None
        for name, value in values.items():
            if name != "seed" or value != session.seed:  # setting a seed restarts its random sequence
                setattr(session, name, value)

    @property
    def busy(self) -> bool:
        """Whether an answer is coming."""
        return self._answering

    def ask(self, text: str) -> str:
        """Send a message from code, wait for the answer, and return it.

        A message that is being edited in the field is no longer edited; a changed text stays there.

        Raises:
            OptionError: An answer is coming already.
            Exception: The answer failed; the conversation is as before.
        """
        if not self._claim():
            raise OptionError("an answer is coming already", hint="wait for it, or end it: stop()")
        try:
            self._leave_edit()
            thread, result = self._run(self.session.send, text)
        except BaseException:  # an interrupt must not leave the claim behind
            self._release()
            raise
        try:
            thread.join()
        except KeyboardInterrupt:
            self.stop()
            raise
        if result.error:
            raise result.error
        return result.answer

    def stop(self) -> None:
        """End the answer that is coming after its current token. Safe from any thread."""
        self._stopping.set()  # the session may not have begun: `_answer` stops it again
        self.session.stop()

    def clear(self) -> None:
        """Stop the answer, if one is coming, and start a new conversation. Typed text stays."""
        while not self._claim():  # no answer can begin until the conversation is cleared
            self.stop()
            time.sleep(0.005)
        try:
            self.session.clear()
            self._error = self._unsent = None
            self._leave_edit()
            self._show(self.session.messages)
        finally:
            self._release()

    def loop(self) -> None:
        """Continue the conversation as plain text, where no widgets can be shown."""
        if self.busy:
            raise OptionError("an answer is coming already", hint="wait for it, or end it: stop()")
        chat_loop(self.session)
        self.refresh()

    def _send(self) -> None:
        """Send the field's text, as a new message or in place of the one that is being edited."""
        text, edited, draft = self._input.value, self._edited, self._draft
        if text.strip() and self._claim():
            self._end_edit(draft)  # first: a failure restores it
            ask = self.session.send if edited is None else self.session.edit
            self._run(ask, text, on_failure=lambda: self._give_back(text, edited, draft))

    def _regenerate(self) -> None:
        if self._edited is None and self._claim():
            self._run(self.session.regenerate)

    def _edit_or_cancel(self) -> None:
        """Put the last message into the field; a second time, restore the text that was there before."""
        if self.busy:
            return
        if self._edited is not None:
            self._end_edit(self._draft)
        elif (last := self._last_message()) is not None:
            self._edited, self._draft, self._input.value = last, self._input.value, last
        self.refresh()

    def _leave_edit(self) -> None:
        """End editing; a text that was changed stays in the field."""
        if self._edited is not None:
            self._end_edit(self._draft if self._input.value == self._edited else self._input.value)

    def _end_edit(self, text: str) -> None:
        self._edited, self._draft, self._input.value = None, "", text

    def _last_message(self) -> str | None:
        sent = (m["content"] for m in reversed(self.session.messages) if m["role"] == "user")
        return next(sent, None)

    def _give_back(self, text: str, edited: str | None, draft: str) -> None:
        """After a failure, restore the field unless something new has been typed."""
        if self._input.value in ("", draft):
            self._edited, self._draft, self._input.value = edited, draft, text
        else:
            self._unsent = text

    def _claim(self) -> bool:
        """Reserve the next answer; False if one is coming already."""
        with self._state:
            if self._answering:
                return False
            self._answering = True
        self._stopping.clear()
        return True

    def _release(self) -> None:
        self._answering = False
        self._show_buttons()

    def _run(
        self, ask: Ask, *arguments: str, on_failure: Callable[[], None] | None = None
    ) -> tuple[threading.Thread, _Result]:
        """Begin the answer that was claimed."""
        result = _Result()
        what = ask, arguments, on_failure, result
        thread = threading.Thread(target=self._answer, args=what, name="chat-widget")
        self._show_buttons()
        try:
            thread.start()
        except BaseException:
            if on_failure is not None:
                on_failure()
            self._release()
            raise
        self._thread = thread
        return thread, result

    def _answer(
        self, ask: Ask, arguments: tuple[str, ...], on_failure: Callable[[], None] | None, result: _Result
    ) -> None:
        """On the thread: show the answer as it comes, or the error, after which the chat continues."""
        self._error = self._unsent = None
        pieces: list[str] = []
        seen_s = 0.0
        try:
            self._read_settings()
            shown = self._before(ask, *arguments)
            with watch(self.session.model) as recorder:
                for piece in ask(*arguments):
                    pieces.append(piece)
                    if self._stopping.is_set():
                        self.session.stop()
                    if time.perf_counter() - seen_s > REFRESH_S:
                        self._show([*shown, {"role": "assistant", "content": "".join(pieces)}], recorder)
                        seen_s = time.perf_counter()
                self._experts.value = grid_html(self.session.model, recorder)
            result.answer = "".join(pieces).strip()  # the session's messages may have been cleared
        except Exception as error:
            self._error = result.error = error
            if on_failure is not None:
                on_failure()
        finally:
            try:
                self._show(self.session.messages)
            finally:
                self._release()

    def _before(self, ask: Ask, text: str | None = None) -> list[Message]:
        """Return the conversation that the answer will follow."""
        session = self.session
        messages = session.messages if ask == session.send else session.messages[: session.last_question]
        question = session.messages[len(messages)] if text is None else {"role": "user", "content": text}
        return [*messages, question]

    def refresh(self) -> None:
        """Show the conversation as it is now, unless an answer is coming, whose thread shows it."""
        if not self.busy:
            self._show(self.session.messages)
        self._show_buttons()

    def _show(self, messages: list[Message], recorder: Recorder | None = None) -> None:
        lines = [bubble(message["role"], message["content"]) for message in messages]
        if self._unsent is not None:
            lines.append(bubble("user", self._unsent))
        if self._error is not None:
            lines.append(bubble("error", describe(self._error)))
        self._text.value = "".join(lines) or '<div style="color:#777">Nothing said yet.</div>'
        if recorder is not None or not self._experts.value:
            self._experts.value = grid_html(self.session.model, recorder)
        status = html.escape(visible(self.status()))
        self._status.value = f'<div class="mo-status" style="line-height:1.5">{status}</div>'

    def _show_buttons(self) -> None:
        """Enable the buttons that can be used now."""
        busy, editing, empty = self.busy, self._edited is not None, self._last_message() is None
        self._stop_button.disabled = not busy
        self._send_button.disabled = busy
        self._again.disabled = busy or editing or empty
        self._edit.disabled = busy or empty
        self._send_button.description = "Resend" if editing else "Send"
        self._edit.description = "Cancel edit" if editing else "Edit last"

    def status(self) -> str:
        """Return the counters of the last answer, or of the one that is coming, and notices about its end."""
        session = self.session
        parts = [str(session.last)] if session.last.n_tokens else []
        parts.append(f"context {session.context_used} of {session.context_length} tokens")
        if session.ended == "stopped":
            parts.append("stopped")
        return "; ".join([*parts, *(notices(session) if session.messages else [])])

    def __repr__(self) -> str:
        """The conversation as text, for front ends without widgets."""
        lines = [f"{message['role']}> {message['content']}" for message in self.session.messages]
        return visible("\n\n".join([*lines, f"[{self.status()}]"]))

    def _repr_mimebundle_(self, **_: object) -> dict[str, Any]:
        view = {"version_major": 2, "version_minor": 0, "model_id": self.box.model_id}
        return {"text/plain": repr(self), "application/vnd.jupyter.widget-view+json": view}


def open_chat(
    model: OffloadedModel, tokenizer: PreTrainedTokenizerBase, **settings: Any
) -> ChatWidget | None:
    """Return the widget in a notebook; elsewhere run the conversation as plain text and return None.

    Args:
        settings: As `ChatSession` takes them.
    """
    try:
        from IPython import get_ipython
    except ImportError:
        shell = None
    else:
        shell = get_ipython()
    if getattr(shell, "kernel", None) is not None:
        return ChatWidget(model, tokenizer, **settings)
    chat_loop(ChatSession(model, tokenizer, **settings))
    return None
