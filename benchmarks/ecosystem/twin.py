"""The model under test, and its twin: transformers' MixtralForCausalLM on the same weights, dequantized."""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import MixtralForCausalLM, PreTrainedModel

from mixtral_offload.runtime.build import from_pretrained
from mixtral_offload.runtime.convert import convert_checkpoint
from mixtral_offload.weights.hqq import Quantization
from mixtral_offload.weights.source import DEMO

FP16 = DEMO.parent / "fp16"
TRAINING = Path(__file__).parents[2] / "training"
#: experts per layer on the device, of 8: most passes load some
CACHE_SIZE = 3
#: as the shipped 4-bit model has it: its matrices are too small for the published groups of scales
FOUR_BITS = Quantization(4, 64, 64, True)


def ours(folder: Path = DEMO, **options) -> PreTrainedModel:
    """The model with offloaded experts, most of them not on the device."""
    return from_pretrained(folder, **{"device": "cpu", "cache_size": CACHE_SIZE} | options)


def twin(folder: Path = DEMO) -> PreTrainedModel:
    """transformers' own model on the same weights, dequantized: nothing of this package runs in it."""
    dequantized = from_pretrained(folder, device="cpu", dequantize_on_load=True)
    config = copy.deepcopy(dequantized.config)
    config._experts_implementation = None
    model = MixtralForCausalLM(config).to(dequantized.dtype)
    missing, unexpected = model.load_state_dict(dequantized.state_dict(), strict=False)
    if missing or unexpected:
        raise RuntimeError(f"the twin has other parameters: {missing + unexpected}")
    model.set_experts_implementation("eager")
    model.generation_config = copy.deepcopy(dequantized.generation_config)
    return model.eval().requires_grad_(False)


@contextmanager
def variants() -> Iterator[dict[str, Path]]:
    """Folders of the shipped model: 16- and 4-bit experts, each with plain and with 4-bit attention."""
    folder = Path(tempfile.mkdtemp(prefix="ecosystem."))
    try:
        yield {
            "fp16 experts, plain attention": FP16,
            "fp16 experts, 4-bit attention": convert_checkpoint(
                FP16, folder / "fp16-4bit", attention=FOUR_BITS
            ),
            "4-bit experts, plain attention": convert_checkpoint(
                DEMO, folder / "4bit-plain", attention=Quantization(16)
            ),
            "4-bit experts, 4-bit attention": DEMO,
        }
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def questions(n: int, one_turn: bool = True) -> list[list[dict[str, str]]]:
    """n held-out conversations that end with the user's message, spread over all domains."""
    lines = [json.loads(line)["messages"] for line in (TRAINING / "heldout.jsonl").read_text().splitlines()]
    lines = [messages for messages in lines if len(messages) == 1 or not one_turn]
    return lines[:: len(lines) // n][:n]


def conversations(n: int) -> list[list[dict[str, str]]]:
    """n held-out conversations with their answers."""
    lines = (TRAINING / "heldout_text.jsonl").read_text().splitlines()
    return [json.loads(line)["messages"] for line in lines[:: len(lines) // n][:n]]


@contextmanager
def last_logits(model: PreTrainedModel) -> Iterator[list[torch.Tensor]]:
    """Collect the logits of each pass's last tokens: they may differ where texts are equal."""
    found: list[torch.Tensor] = []
    hook = model.lm_head.register_forward_hook(
        lambda *called: found.append(called[-1][:, -1].detach().clone())
    )
    try:
        yield found
    finally:
        hook.remove()


@torch.no_grad()
def greedy(model: PreTrainedModel, tokenizer, messages: list[dict[str, str]], n_tokens: int = 40) -> str:
    """The greedy answer, from transformers' own `generate`."""
    prompt = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids = model.generate(
        prompt["input_ids"],
        attention_mask=prompt["attention_mask"],
        max_new_tokens=n_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
