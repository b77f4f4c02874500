"""peft on offloaded experts: LoRA on attention, and prompt tuning, trained and used; compared with the twin.

    python -m benchmarks.ecosystem.peft_lora

For 16- and 4-bit experts, with plain and with 4-bit attention: 20 steps of training from the same start.
Compared: each step's loss and gradients; logits with the trained adapter, with the adapter switched off,
after saving and loading, and after merging.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from mixtral_offload.errors import OffloadError
from mixtral_offload.generation.tokenizer import load_tokenizer

from .checks import Check, close, exit_with, refused, run_program
from .twin import conversations, ours, twin, variants

PACKAGES = ("peft",)
STEPS, BATCHES, SEQUENCES, LONGEST = 20, 4, 4, 96
TOLERANCE = 1e-4
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj"]


def batches(tokenizer) -> list[dict[str, Tensor]]:
    """BATCHES padded batches; padding has no label."""
    tokenizer.padding_side = "right"
    texts = [tokenizer.apply_chat_template(of, tokenize=False) for of in conversations(BATCHES * SEQUENCES)]
    found = []
    for number in range(BATCHES):
        batch = dict(
            tokenizer(
                texts[number * SEQUENCES :][:SEQUENCES], return_tensors="pt", padding=True, truncation=True,
                max_length=LONGEST, add_special_tokens=False, return_token_type_ids=False,
            )
        )  # fmt: skip
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        found.append(batch)
    return found


def lora(model):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=PROJECTIONS, task_type="CAUSAL_LM")
    return get_peft_model(model, settings)


def prompt_tuning(model):
    from peft import PromptTuningConfig, get_peft_model

    torch.manual_seed(0)
    return get_peft_model(model, PromptTuningConfig(num_virtual_tokens=8, task_type="CAUSAL_LM"))


def trained(model) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def train(model, of: list[dict[str, Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
    """(loss of each step, all trained parameters' gradients of each step, flat)."""
    optimizer = torch.optim.SGD(trained(model).values(), lr=0.2)
    losses, gradients = [], []
    model.train()
    for step in range(STEPS):
        batch = of[step % BATCHES]
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in trained(model).values()]).clone())
        optimizer.step()
    model.eval()
    return losses, gradients


@torch.no_grad()
def logits(model, of: list[dict[str, Tensor]]) -> Tensor:
    """Logits of the real tokens of one batch."""
    batch = of[0]
    found = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    real = batch["attention_mask"].bool()
    return found[:, -real.shape[1] :][real]  # a learned prompt stands before them


def compare_training(name: str, before: Tensor, mine, reference, of) -> Iterator[Check]:
    """Train both; check losses, gradients and the answers afterwards.

    Args:
        before: Logits without an adapter.
    """
    with torch.no_grad():
        for a, b in zip(trained(mine).values(), trained(reference).values(), strict=True):
            b.copy_(a)
    (losses, gradients), (expected, right) = train(mine, of), train(reference, of)
    yield close(f"{name}: losses of {STEPS} steps", losses, expected, TOLERANCE)
    change = (sum(losses[-BATCHES:]) - sum(losses[:BATCHES])).item() / BATCHES
    yield Check(f"{name}: the loss falls", change, -0.001, 1, "change of the mean loss of all batches")
    yield close(f"{name}: gradients of {STEPS} steps", gradients, right, TOLERANCE)
    found, wanted = logits(mine, of), logits(reference, of)
    yield close(f"{name}: logits after training", [found], [wanted], TOLERANCE)
    with mine.disable_adapter():
        yield close(f"{name}: logits without the adapter, as before", [logits(mine, of)], [before], 0)
    ids = of[0]["input_ids"][:1, :12]
    answers = [
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
        for model in (mine, reference)
    ]
    yield Check(
        f"{name}: greedy tokens", int((answers[0] != answers[1]).sum()), 0, answers[0].numel(), "unequal"
    )


def compare_saved(name: str, folder: Path, mine, of) -> Check:
    """Save the adapter, put it on a new model: the same bits."""
    from peft import PeftModel

    with tempfile.TemporaryDirectory() as saved:
        mine.save_pretrained(saved)
        again = PeftModel.from_pretrained(ours(folder), saved).eval()
    return close(
        f"{name}: logits of the saved adapter on a new model", [logits(again, of)], [logits(mine, of)], 0
    )


def merged(name: str, mine, reference, of) -> Check:
    """Merge into plain attention: the twin's logits; quantized attention refuses."""
    wanted, before = logits(reference, of), logits(mine, of)
    try:
        plain = mine.merge_and_unload()
    except OffloadError as error:
        kept = close(f"{name}: merging is refused, the adapter still works", [logits(mine, of)], [before], 0)
        kept.message = str(error).splitlines()[0]
        return kept
    return close(f"{name}: logits after merging", [logits(plain, of)], [wanted], TOLERANCE)


def others(of) -> Iterator[Check]:
    """Check DoRA, and adapters of experts: refused unless dequantized on load."""
    from peft import LoraConfig, get_peft_model

    def logits_and_gradients(model, **options) -> tuple[list, list]:
        torch.manual_seed(0)
        config = LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False, **options)
        adapted = get_peft_model(model, config)
        output = adapted(**of[0])
        output.loss.backward()
        wanted = sorted((name, of.grad) for name, of in adapted.named_parameters() if of.requires_grad)
        return [output.logits.detach()], [gradient for _, gradient in wanted]

    linear = ["q_proj", "v_proj", "w1", "w2", "w3"]
    for name, options, dequantize in (
        ("DoRA on 4-bit attention", {"target_modules": ["q_proj", "v_proj"], "use_dora": True}, False),
        ("LoRA on all linear layers, dequantized", {"target_modules": "all-linear"}, True),
        ("LoRA on attention and experts, dequantized", {"target_modules": linear}, True),
    ):
        model = ours(dequantize_on_load=True, cache_size=None) if dequantize else ours()
        found, wanted = (logits_and_gradients(each, **options) for each in (model, twin()))
        yield close(f"{name}: logits", found[0], wanted[0], TOLERANCE)
        yield close(f"{name}: gradients", found[1], wanted[1], TOLERANCE)
    for name, options in (
        ("LoRA on all linear layers", {"target_modules": "all-linear"}),
        ("LoRA on attention and experts", {"target_modules": linear}),
        ("modules_to_save of 4-bit attention", {"target_modules": ["q_proj"], "modules_to_save": ["v_proj"]}),
    ):
        yield refused(name, lambda options=options: logits_and_gradients(ours(), **options), OffloadError)


def checks() -> Iterator[Check]:
    """The checks of every variant; one that raises does not end the others."""
    from peft import LoraConfig, get_peft_model

    tokenizer = load_tokenizer()
    of = batches(tokenizer)
    with variants() as folders:
        for variant, folder in folders.items():
            for kind, adapt in (("LoRA", lora), ("prompt tuning", prompt_tuning)):
                name = f"{variant}, {kind}"
                model = ours(folder)
                before = logits(model, of)
                try:
                    mine, reference = adapt(model), adapt(twin(folder))
                    yield from compare_training(name, before, mine, reference, of)
                    yield compare_saved(name, folder, mine, of)
                    if kind == "LoRA":
                        yield merged(name, mine, reference, of)
                except (ValueError, RuntimeError, TypeError, AttributeError, NotImplementedError) as error:
                    yield Check(
                        f"{name}: trains", None, 0, 1, "runs", message=f"{type(error).__name__}: {error}"
                    )
    yield from others(of)
    for parameters in (["mlp.experts.gate_up_proj"], ["mlp.experts.down_proj"]):
        config = LoraConfig(r=4, target_modules=[], target_parameters=parameters)
        yield refused(
            f"LoRA on {parameters[0]}", lambda config=config: get_peft_model(ours(), config), ValueError
        )


if __name__ == "__main__":
    exit_with(run_program("peft", PACKAGES, checks))
