"""langchain on offloaded experts: chat, streaming, batches, a chain; compared with the twin.

python -m benchmarks.ecosystem.langchain_chat
"""

from __future__ import annotations

from collections.abc import Iterator

from mixtral_offload.generation.tokenizer import load_tokenizer

from .checks import Check, close, equal, exit_with, run_program
from .twin import greedy, last_logits, ours, questions, twin

PACKAGES = ("langchain-huggingface", "langchain-core")
PROMPTS, LONGEST = 6, 32
TOLERANCE = 1e-4


def chat(model, tokenizer):
    from langchain_huggingface import ChatHuggingFace, HuggingFacePipeline
    from transformers import pipeline

    answers = pipeline(
        "text-generation",
        model=model,
        tokenizer=tokenizer,
        max_new_tokens=LONGEST,
        do_sample=False,
        return_full_text=False,
    )
    return ChatHuggingFace(llm=HuggingFacePipeline(pipeline=answers), tokenizer=tokenizer)


def answers(model, tokenizer, at_once: bool) -> dict[str, list[str]]:
    """What each way of asking gives."""
    from langchain_core.output_parsers import StrOutputParser
    from langchain_core.prompts import ChatPromptTemplate

    asked = [messages[0]["content"] for messages in questions(PROMPTS)]
    model = chat(model, tokenizer)
    chain = ChatPromptTemplate.from_messages([("human", "{question}")]) | model | StrOutputParser()
    if at_once:  # in a pool of threads
        return {"batch": [answer.content for answer in model.batch(asked)]}
    return {
        "invoke": [model.invoke(text).content for text in asked],
        "stream": ["".join(piece.content for piece in model.stream(text)) for text in asked],
        "a chain": [chain.invoke({"question": text}) for text in asked],
    }


def checks() -> Iterator[Check]:
    tokenizer = load_tokenizer()
    given, logits = [], []
    for model in (ours(), twin()):
        with last_logits(model) as of_model:
            given.append(answers(model, tokenizer, at_once=False))
        logits.append(of_model)
        given[-1] |= answers(model, tokenizer, at_once=True)
    found, expected = given
    yield close("logits at every token of all answers", *logits, TOLERANCE)
    for way in found:
        yield equal(f"answers from {way}", found[way], expected[way])
    reference = twin()
    plain = [greedy(reference, tokenizer, of, LONGEST) for of in questions(PROMPTS)]
    yield equal("answers from invoke, as generate gives them", found["invoke"], plain)


if __name__ == "__main__":
    exit_with(run_program("langchain", PACKAGES, checks))
