"""Fixtures of several files of the runtime's tests."""

import pytest
import torch

from mixtral_offload import load_tokenizer
from tests.twin import twin


@pytest.fixture(scope="module")
def reference():
    return twin().requires_grad_(False)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture(scope="module")
def batches(tokenizer):
    # the tokenizer's own padding is a token whose embedding is zero: no expert would make anything of it
    other = torch.Generator().manual_seed(7)
    texts = [
        ["Once upon a time there was a fox who", "12 + 7 ="],
        ["What is the capital of France? Tell me", "Hi"],
        ["Hello", "Tell me about Japan and its cities, please"],
    ]
    batches = [dict(tokenizer(of, padding=True, return_tensors="pt")) for of in texts]
    for batch in batches:
        padding = batch["attention_mask"] == 0
        batch["input_ids"][padding] = torch.randint(3, 1536, (int(padding.sum()),), generator=other)
    return batches
