"""A few seconds that notice most faults: the shipped model compared with transformers' own twin."""

import pytest
import torch

from mixtral_offload import ChatSession, load_tokenizer

from ..twin import limit, relative_error, twin
from .identity import logits_of, prompts


@pytest.fixture(scope="module")
def reference():
    model = twin()
    return model, [logits_of(model, ids, 6) for ids in prompts(2)]


@pytest.mark.both_products
@pytest.mark.parametrize(
    "options",
    [
        {"cache_size": 2, "prefetch": 4, "look_ahead": 2, "throttle": "400MB"},
        {"cache_size": 3, "store": "disk", "prefetch": 2},
        {"cache_size": 2},
    ],
)
def test_logits_are_the_twins(offloaded, reference, options):
    model = offloaded(**options)
    for ids, expected in zip(prompts(2), reference[1]):
        assert relative_error(logits_of(model, ids, 6), expected) < limit(1e-5)


def test_a_conversation_is_the_twins(offloaded, reference):
    model, tokenizer = offloaded(cache_size=2), load_tokenizer()
    chat = ChatSession(model, tokenizer, max_new_tokens=12)
    for text in ("What is the capital of France?", "And of Italy?"):
        "".join(chat.send(text))
        answer, question = chat.messages[-1]["content"], chat.messages[:-1]
        ids = tokenizer.apply_chat_template(
            question, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        new = reference[0].generate(ids["input_ids"], max_new_tokens=12, do_sample=False)[
            0, ids["input_ids"].shape[1] :
        ]
        assert tokenizer.decode(new, skip_special_tokens=True).strip() == answer
    first = "".join(chat.regenerate())
    assert first.strip() == answer
    assert torch.is_tensor(ids["input_ids"])
