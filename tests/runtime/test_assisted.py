"""Several tokens per pass: transformers' assisted generation on an offloaded model gives the same answers."""

import pytest
import torch

from mixtral_offload import from_pretrained, load_tokenizer
from mixtral_offload.weights.source import DEMO

PROMPTS = ("Tell me a story about a fox.", "Say hello in Greek. Say hello in Greek.", "What is 12 + 30?")


@pytest.fixture(scope="module")
def prompts():
    tokenizer = load_tokenizer()
    messages = ([{"role": "user", "content": text}] for text in PROMPTS)
    return [
        tokenizer.apply_chat_template(of, add_generation_prompt=True, return_dict=True, return_tensors="pt")
        for of in messages
    ]


def answers(model, prompts, **assistance):
    with torch.inference_mode():
        return [
            model.generate(**prompt, max_new_tokens=48, do_sample=False, **assistance).tolist()
            for prompt in prompts
        ]


@pytest.fixture(scope="module")
def plain(prompts):
    return answers(from_pretrained(cache_size=8), prompts)


@pytest.mark.parametrize(
    "options",
    [{"cache_size": 2, "store": "disk"}, {"cache_size": 3, "prefetch": 2, "look_ahead": 2}],
    ids=str,
)
@pytest.mark.parametrize("how", ["prompt lookup", "draft model", "offloaded draft model"])
def test_assisted_answers_are_the_plain_ones(prompts, plain, how, options):
    model = from_pretrained(**options)
    passes = []
    model.get_input_embeddings().register_forward_pre_hook(
        lambda _, inputs: passes.append(inputs[0].shape[-1])
    )
    draft = {"draft model": {"cache_size": 8}, "offloaded draft model": {"cache_size": 2}}
    if how == "prompt lookup":
        assistance = {"prompt_lookup_num_tokens": 4}
    else:
        assistance = {"assistant_model": from_pretrained(DEMO, **draft[how])}
    assert answers(model, prompts, **assistance) == plain
    assert sum(1 < n < 10 for n in passes) > 3  # several tokens went through one pass
    assert model.offload.stats.misses > 0
