"""gradio with four users at once on one model: each stream equals what its user gets alone, and the twin's.

    python -m benchmarks.ecosystem.gradio_four_users

A ChatInterface with a queue, on the loopback interface; four clients, each in a thread, with two turns each.
Answers come from a `ChatSession` of this package, then from transformers' `generate` with a streamer, as in
gradio's guides.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

from transformers import TextIteratorStreamer

from mixtral_offload.generation.chat import ChatSession
from mixtral_offload.generation.tokenizer import load_tokenizer

from .checks import Check, equal, exit_with, run_program
from .twin import greedy, ours, questions, twin

PACKAGES = ("gradio", "gradio_client")
USERS, TURNS, LONGEST = 4, 2, 40

Answer = Callable[[str, list], Iterator[str]]


def said(history: list) -> list[dict[str, str]]:
    """gradio's history as messages; content may come as a list of parts."""
    found = []
    for message in history:
        content = message["content"]
        text = content if isinstance(content, str) else "".join(part["text"] for part in content)
        found.append({"role": message["role"], "content": text})
    return found


def from_session(model, tokenizer) -> Answer:
    """One session for each answer; sessions share the model."""

    def answer(text: str, history: list) -> Iterator[str]:
        session = ChatSession(model, tokenizer, max_new_tokens=LONGEST)
        session.messages = said(history)
        whole = ""
        for piece in session.send(text):
            whole += piece
            yield whole.strip()

    return answer


def from_generate(model, tokenizer) -> Answer:
    """transformers' own streaming, a thread for each answer."""

    def answer(text: str, history: list) -> Iterator[str]:
        messages = [*said(history), {"role": "user", "content": text}]
        prompt = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=120)
        settings = {
            "max_new_tokens": LONGEST,
            "do_sample": False,
            "streamer": streamer,
            "pad_token_id": tokenizer.pad_token_id,
        }
        inputs = {name: prompt[name] for name in ("input_ids", "attention_mask")}
        worker = threading.Thread(target=model.generate, kwargs={**inputs, **settings})
        worker.start()
        whole = ""
        for piece in streamer:
            whole += piece
            yield whole.strip()
        worker.join()

    return answer


def ask(url: str, texts: list[str]) -> tuple[list[str], int]:
    """One user's answers, and in how many pieces they came."""
    from gradio_client import Client

    client, answers, pieces = Client(url, verbose=False), [], 0
    for text in texts:
        job = client.submit(text, api_name="/chat")
        for _ in job:
            pieces += 1
        answers.append(job.result())
    return answers, pieces


def served(answer: Answer, asked: list[list[str]]) -> tuple[list, list, int]:
    """(each user's answers alone, all users' at once, pieces of the latter)."""
    import gradio

    with gradio.ChatInterface(answer, api_name="chat") as page:
        page.queue(default_concurrency_limit=USERS)
    _, url, _ = page.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
    try:
        alone = [ask(url, texts)[0] for texts in asked]
        together: list = [None] * len(asked)

        def user(number: int) -> None:
            try:
                together[number] = ask(url, asked[number])
            except Exception as error:  # this user's answer, for the comparison
                together[number] = [f"{type(error).__name__}: {error}"], 0

        threads = [threading.Thread(target=user, args=(number,)) for number in range(len(asked))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        page.close(verbose=False)
    return alone, [answers for answers, _ in together], sum(pieces for _, pieces in together)


def expected(asked: list[list[str]], tokenizer) -> list[list[str]]:
    """Return the twin's answers to each user."""
    model, found = twin(), []
    for texts in asked:
        messages, answers = [], []
        for text in texts:
            messages.append({"role": "user", "content": text})
            answers.append(greedy(model, tokenizer, messages, LONGEST).strip())
            messages.append({"role": "assistant", "content": answers[-1]})
        found.append(answers)
    return found


def checks() -> Iterator[Check]:
    tokenizer = load_tokenizer()
    texts = [messages[0]["content"] for messages in questions(USERS * TURNS)]
    asked = [texts[user::USERS] for user in range(USERS)]
    right = expected(asked, tokenizer)
    for name, make in (("ChatSession", from_session), ("generate with a streamer", from_generate)):
        model = ours()
        alone, together, pieces = served(make(model, tokenizer), asked)
        yield equal(f"{name}: four users at once, as alone", together, alone, "users with another answer")
        yield equal(f"{name}: as the twin", together, right, "users with another answer")
        yield Check(
            f"{name}: answers came in pieces", USERS * TURNS * 3 - pieces, 0, pieces, "pieces missing"
        )


if __name__ == "__main__":
    exit_with(run_program("gradio", PACKAGES, checks))
