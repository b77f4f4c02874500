"""llama-index on offloaded experts: completion, streaming, chat, a query; compared with the twin.

python -m benchmarks.ecosystem.llama_index_query
"""

from __future__ import annotations

from collections.abc import Iterator

from mixtral_offload.generation.tokenizer import load_tokenizer

from .checks import Check, close, equal, exit_with, run_program
from .twin import last_logits, ours, questions, twin

PACKAGES = ("llama-index-llms-huggingface", "llama-index-core")
PROMPTS, LONGEST = 5, 32
TOLERANCE = 1e-4
DOCUMENTS = (
    "The capital of France is Paris. Paris lies on the Seine.",
    "The capital of Italy is Rome. Rome lies on the Tiber.",
    "Tom has a red boat. Sara has a blue kite.",
)


def answers(model, tokenizer) -> dict[str, list[str]]:
    """What each way of asking gives."""
    from llama_index.core import Document, SummaryIndex
    from llama_index.core.llms import ChatMessage
    from llama_index.llms.huggingface import HuggingFaceLLM

    def to_prompt(messages) -> str:
        turns = [{"role": message.role.value, "content": message.content} for message in messages]
        return tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)

    llm = HuggingFaceLLM(
        model=model,
        tokenizer=tokenizer,
        context_window=1024,
        max_new_tokens=LONGEST,
        generate_kwargs={"do_sample": False},
        messages_to_prompt=to_prompt,
        completion_to_prompt=lambda text: to_prompt([ChatMessage(role="user", content=text)]),
        tokenizer_kwargs={"add_special_tokens": False},
        device_map="cpu",
        is_chat_model=True,
    )
    asked = [messages[0]["content"] for messages in questions(PROMPTS)]
    index = SummaryIndex.from_documents([Document(text=text) for text in DOCUMENTS])
    engine = index.as_query_engine(llm=llm, response_mode="compact")
    return {
        "complete": [llm.complete(text).text for text in asked],
        "stream_complete": [
            "".join(piece.delta or "" for piece in llm.stream_complete(text)) for text in asked
        ],
        "chat": [llm.chat([ChatMessage(role="user", content=text)]).message.content for text in asked],
        "a query over documents": [
            str(engine.query(text)) for text in ("What is the capital of Italy?", "What does Tom have?")
        ],
    }


def checks() -> Iterator[Check]:
    tokenizer = load_tokenizer()
    given, logits = [], []
    for model in (ours(), twin()):
        with last_logits(model) as of_model:
            given.append(answers(model, tokenizer))
        logits.append(of_model)
    found, expected = given
    yield close("logits at every token of all answers", *logits, TOLERANCE)
    for way in found:
        yield equal(f"answers from {way}", found[way], expected[way])
    yield Check(
        "queries that got an answer",
        sum(not text for text in found["a query over documents"]),
        0,
        2,
        "empty answers",
    )


if __name__ == "__main__":
    exit_with(run_program("llama-index", PACKAGES, checks))
