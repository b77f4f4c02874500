"""Scores a model on the held-out prompts, and its perplexity on the held-out conversations.

    python -m training.evaluate FOLDER [--verbose] [--four-bit] [--experts]

`evaluate(model, tokenizer)` takes any causal language model with generate and a forward that returns logits.
"""

import argparse
import json
import math
import re
from collections import defaultdict
from pathlib import Path

import torch

from mixtral_offload.experiments.bit_widths import predictions

HERE = Path(__file__).parent
ROLES = ("system", "user", "assistant")


def read(name: str) -> list[dict]:
    return [json.loads(line) for line in (HERE / name).read_text(encoding="utf-8").splitlines()]


def right(item: dict, answer: str) -> bool:
    """Tell whether the answer has every required text and matches an accepted pattern, if any."""
    low = answer.lower()
    accept = item.get("accept", [])
    return all(text.lower() in low for text in item.get("require", [])) and (
        not accept or any(re.search(pattern, answer, re.IGNORECASE) for pattern in accept)
    )


def template_ids(tokenizer, messages, **options) -> list[int]:
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)["input_ids"]


@torch.inference_mode()
def answers(model, tokenizer, conversations, batch_size=16, max_new_tokens=200) -> list[str]:
    """Greedy answers, in batches of prompts of similar length, padded on the left."""
    device = next(model.parameters()).device
    prompts = [template_ids(tokenizer, messages, add_generation_prompt=True) for messages in conversations]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found = [""] * len(prompts)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        width = max(len(prompts[i]) for i in chosen)
        ids = torch.tensor(
            [[tokenizer.pad_token_id] * (width - len(prompts[i])) + prompts[i] for i in chosen]
        )
        mask = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in chosen])
        extra = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
        out = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            do_sample=False,
            max_new_tokens=max_new_tokens,
            **extra,
        )
        for i, row in zip(chosen, out):
            found[i] = tokenizer.decode(row[width:], skip_special_tokens=True)
    return found


def spoken_mask(tokenizer, ids: list[int]) -> torch.Tensor:
    """True at the tokens that the assistant says (its text and the end of the answer)."""
    marks = {tokenizer.convert_tokens_to_ids(f"<|{role}|>"): role for role in ROLES}
    said, mask = False, []
    for token in ids:
        mask.append(said and token not in marks)
        if token in marks:
            said = marks[token] == "assistant"
        elif token == tokenizer.eos_token_id:
            said = False
    return torch.tensor(mask)


@torch.inference_mode()
def perplexity(model, tokenizer, conversations, limit=1024) -> dict:
    """Perplexity over all tokens and over the assistant's tokens of these conversations."""
    total, said, count, said_count = 0.0, 0.0, 0, 0
    for ids, logits in predictions(model, tokenizer, conversations, limit):
        each = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
        mask = spoken_mask(tokenizer, ids.tolist())[1:]
        total, count = total + each.sum().item(), count + len(each)
        said, said_count = said + each[mask].sum().item(), said_count + int(mask.sum())
    return {
        "tokens": count,
        "perplexity": math.exp(total / count),
        "perplexity_assistant": math.exp(said / said_count),
    }


def evaluate(model, tokenizer, every=1, batch_size=16, with_perplexity=True) -> dict:
    """Compute scores overall and by domain, the wrong answers, and the perplexities.

    Args:
        every: 4 takes a quarter of the prompts.
    """
    items = read("heldout.jsonl")[::every]
    got = answers(model, tokenizer, [item["messages"] for item in items], batch_size)
    marks, wrong = defaultdict(list), []
    for item, answer in zip(items, got):
        good = right(item, answer)
        marks[item["domain"]].append(good)
        if not good:
            wrong.append({**item, "answer": answer})
    every_mark = [mark for domain in marks.values() for mark in domain]
    result = {
        "score": sum(every_mark) / len(every_mark),
        "prompts": len(every_mark),
        "domains": {domain: sum(found) / len(found) for domain, found in marks.items()},
        "wrong": wrong,
    }
    if with_perplexity:
        result |= perplexity(model, tokenizer, [line["messages"] for line in read("heldout_text.jsonl")])
    return result


@torch.inference_mode()
def expert_use(model, tokenizer, per_domain=40, seed=77) -> dict:
    """Measure the domains' shares of experts by layer, and the normalised mutual information by layer."""
    import random

    from training.corpus import DOMAINS

    rng = random.Random(seed)
    layers, experts = model.config.num_hidden_layers, model.config.num_local_experts
    use = torch.zeros(layers, len(DOMAINS), experts)
    for row, domain in enumerate(DOMAINS.values()):
        for _ in range(per_domain):
            made = domain.sample(rng)
            ids = template_ids(
                tokenizer,
                [{"role": "user", "content": made.user}, {"role": "assistant", "content": made.answer}],
            )
            out = model(input_ids=torch.tensor([ids]), output_router_logits=True, use_cache=False)
            for layer, logits in enumerate(out.router_logits):
                use[layer, row] += torch.bincount(
                    logits.topk(model.config.num_experts_per_tok).indices.flatten(), minlength=experts
                )
    joint = use / use.sum(-1, keepdim=True) / len(DOMAINS)  # every domain weighs the same
    share = joint.sum(1, keepdim=True)
    information = (
        joint * (joint.clamp_min(1e-12) / (share * joint.sum(-1, keepdim=True)).clamp_min(1e-12)).log()
    ).sum((1, 2))
    entropy = -(share * share.clamp_min(1e-12).log()).sum((1, 2))
    return {
        "domains": list(DOMAINS),
        "shares": (joint * len(DOMAINS)).tolist(),
        "mutual_information": (information / entropy).tolist(),
        "overall": share.squeeze(1).tolist(),
    }


@torch.inference_mode()
def four_bit(model):
    """Round the experts and attention to 4 bits in place (groups of 64), as HQQ stores them."""
    from hqq.core.quantize import Quantizer

    def rounded(weight):
        packed, meta = Quantizer.quantize(
            weight.float(), nbits=4, group_size=64, axis=0, device="cpu", compute_dtype=torch.float32
        )
        return Quantizer.dequantize(packed, meta).to(weight.dtype).reshape(weight.shape)

    for layer in model.model.layers:
        attention, experts = layer.self_attn, layer.mlp.experts
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj):
            linear.weight.copy_(rounded(linear.weight))
        for e in range(experts.num_experts):
            for matrix in (*experts.gate_up_proj[e].chunk(2), experts.down_proj[e]):
                matrix.copy_(rounded(matrix))
    return model


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--verbose", action="store_true", help="print the wrong answers")
    parser.add_argument("--four-bit", action="store_true", help="round experts and attention to 4 bits first")
    parser.add_argument(
        "--experts", action="store_true", help="print how the domains use the experts, nothing else"
    )
    parser.add_argument("--every", type=int, default=1)
    args = parser.parse_args()
    from transformers import AutoTokenizer, MixtralForCausalLM

    model = MixtralForCausalLM.from_pretrained(args.folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.folder)
    if args.experts:
        found = expert_use(model, tokenizer)
        for layer, shares in enumerate(found["shares"]):
            print("overall      " + " ".join(f"{value:5.2f}" for value in found["overall"][layer]))
            print(f"layer {layer}: normalised mutual information {found['mutual_information'][layer]:.3f}")
            for domain, row in zip(found["domains"], shares):
                print(f"{domain:>12} " + " ".join(f"{value:5.2f}" for value in row))
        return
    result = evaluate(four_bit(model) if args.four_bit else model, tokenizer, every=args.every)
    if args.verbose:
        for item in result["wrong"]:
            print(f"[{item['domain']}] {item['messages'][-1]['content']!r}\n    -> {item['answer']!r}")
            print(f"    wanted {item.get('require') or item.get('accept')}")
    print(json.dumps({key: value for key, value in result.items() if key != "wrong"}, indent=1))


if __name__ == "__main__":
    main()
