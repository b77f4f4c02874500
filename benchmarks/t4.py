"""A projection of Mixtral-8x7B on Colab's free T4, from byte counts, rates and a timed replay.

    python benchmarks/t4.py

No GPU is used. Plans are those of `mixtral-offload plan` for 15 GB and for the 15.8 GB that a T4 has, with 10
GB of RAM (of Colab's 12.7, Python and CUDA take the rest); links of 12 GB/s (PCIe 3.0 x16) and 6; 2- and
3-bit experts; routing like Mixtral's (`synthetic.CURVES`); kernels at half of 320 GB/s (assumed). The host's
time per layer is measured here: the shipped model's decoding layer with everything on the device, mostly
Python and launches. Prints a table and writes benchmarks/results/t4-projection.json and a picture of time per
token over slots and look-ahead.

A second table is for misses that are copied, computed by the CPU, or split (`misses=`), with RAM for all
experts, of Mixtral-8x7B and Qwen3-30B-A3B. The CPU's rate is measured here too, with one thread: on a machine
of two cores, the other one drives the card.
"""

import itertools
import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch
from machine import machine, words
from products import SPREAD_BYTES, random_matrix, take_turns
from shapes import mixtral_config
from transformers import AutoConfig

from mixtral_offload import from_pretrained
from mixtral_offload.analysis.planner import PlanRequest, answer, expected_trace
from mixtral_offload.analysis.plots.timeline import plot_time_over_slots
from mixtral_offload.core.misses import MISSES
from mixtral_offload.errors import CapacityError
from mixtral_offload.experiments.baselines import layer_seconds
from mixtral_offload.models.sizes import ModelSizes, model_sizes
from mixtral_offload.weights.hqq import PAPER
from mixtral_offload.weights.native import find_native

RESULTS = Path(__file__).parent / "results"
VRAM, RAM = ("15GB", "15.8GB"), "10GB"
LOOK_AHEADS = (1, 3)
#: RAM for every expert, where the CPU may compute them
ALL_RAM = "30GB"
#: Qwen/Qwen3-30B-A3B, config.json
QWEN3 = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "norm_topk_prob": True,
}


def row(request: PlanRequest) -> dict:
    found = answer(request)
    projection, plan = found.projection, found.plan
    return {
        "tokens_per_s": projection.tokens_per_s,
        "first_token_s": projection.first_token_s,
        "store": plan.store,
        "experts_per_layer": (plan.n_resident + sum(plan.slots.values())) / len(plan.slots),
        "hit_rate": projection.hit_rate,
        "copies_per_token": projection.misses_per_token,
        "copy_s": projection.costs.copy_s,
        "compute_s": projection.compute_s,
        "link_bound_tokens_per_s": 1 / (projection.misses_per_token * projection.costs.copy_s),
        "over_floor": projection.over_floor,
    }


@torch.no_grad()
def cpu_bytes_per_s(sizes: ModelSizes) -> float:
    """Packed bytes per second that the kernels read here for one token, of an expert's first matrix."""
    native, why_not = find_native()
    if native is None:
        raise SystemExit(f"no kernels: {why_not}")
    shape, quantization = (sizes.intermediate, sizes.hidden), PAPER[sizes.bits]
    fields = random_matrix(shape, quantization, "cpu")
    n_bytes = sum(value.nbytes for value in fields.values())
    copies = [{name: of.clone() for name, of in fields.items()} for _ in range(SPREAD_BYTES // n_bytes)]
    many, x = itertools.cycle(copies), torch.randn(1, sizes.hidden)
    seconds = take_turns({"": lambda: native.linear(x, next(many), shape, quantization)}, 40, "cpu")[""]
    return n_bytes / seconds


def misses_rows(sizes: ModelSizes, host_s: float) -> list[dict]:
    """What the CPU's help would be worth on a T4, with links of 12 and 6 GB/s."""
    cpu, rows = cpu_bytes_per_s(sizes), []
    for link, prefetch in product(("12GB/s", "6GB/s"), (2, 0)):
        request = PlanRequest.parse(sizes, vram="15GB", ram=ALL_RAM, link=link, cpu=cpu, prefetch=prefetch)
        found = {of: answer(replace(request, host_s=host_s, misses=of)) for of in MISSES}
        each = {of: found[of].projection for of in MISSES}
        rows.append(
            {
                "model": sizes.model_type,
                "bits": sizes.bits,
                "link": link,
                "prefetch": prefetch,
                "cpu_bytes_per_s": cpu,
                "copy_s": each["copy"].costs.copy_s,
                "cpu_expert_s": each["cpu"].costs.cpu_expert_s,
                "tokens_per_s": {of: projection.tokens_per_s for of, projection in each.items()},
                "first_token_s": {of: projection.first_token_s for of, projection in each.items()},
                "hit_rate": {of: projection.hit_rate for of, projection in each.items()},
                "misses_per_token": {of: projection.misses_per_token for of, projection in each.items()},
                "computed_per_token": {of: projection.computed_per_token for of, projection in each.items()},
            }
        )
        speeds = ", ".join(f"{of} {projection.tokens_per_s:.1f}" for of, projection in each.items())
        print(
            f"{sizes.model_type} {sizes.bits} bits {link:6} {prefetch} predicted: "
            f"tokens/s {speeds}; a miss is copied in "
            f"{1e3 * rows[-1]['copy_s']:.2f} ms, computed in {1e3 * rows[-1]['cpu_expert_s']:.2f} ms "
            f"({cpu / 1e9:.1f} GB/s); of {each['auto'].misses_per_token:.1f} misses a token auto computes "
            f"{each['auto'].computed_per_token:.1f}",
            flush=True,
        )
    return rows


def main() -> None:
    here = machine("cpu")
    torch.set_num_threads(1)
    host_s = layer_seconds(from_pretrained(cache_size=2, store="ram"), 40)
    print(words(here))
    print(f"the host's time for a layer, measured here: {1e3 * host_s:.2f} ms")
    config = mixtral_config()
    sizes = model_sizes(AutoConfig.for_model(config.pop("model_type"), **config))
    rows = []
    for bits, vram, link, ahead in product((2, 3), VRAM, ("12GB/s", "6GB/s"), LOOK_AHEADS):
        setting = {"bits": bits, "vram": vram, "link": link, "look_ahead": ahead}
        request = PlanRequest.parse(sizes.at(bits, 4), vram=vram, ram=RAM, link=link, look_ahead=ahead)
        try:
            found = row(replace(request, host_s=host_s))
        except CapacityError as error:
            found = {"failed": str(error)}
            print(setting, error)
            continue
        rows.append(setting | found)
        print(
            f"{bits} bits, {vram:6} {link:6} {ahead} ahead: {found['tokens_per_s']:5.1f} tokens/s "
            f"(link alone {found['link_bound_tokens_per_s']:.1f}), "
            f"first token {found['first_token_s']:.1f} s, "
            f"{found['experts_per_layer']:.1f} of 8 experts per layer, store {found['store']}, "
            f"{found['copies_per_token']:.1f} copies of {1e3 * found['copy_s']:.1f} ms a token",
            flush=True,
        )
    best = PlanRequest.parse(sizes.at(2, 4), vram=VRAM[1], ram=RAM, link="12GB/s", look_ahead=3)
    figure, _ = plot_time_over_slots(
        expected_trace(best), answer(replace(best, host_s=host_s)).projection.costs
    )
    figure.savefig(RESULTS / "t4-projection.png", dpi=120)
    qwen3 = model_sizes(AutoConfig.for_model(**QWEN3))
    models = (sizes.at(2, 4), sizes.at(3, 4), qwen3.at(4, 4))
    misses = [found for of in models for found in misses_rows(of, host_s)]
    result = {"host_s": host_s, "machine": here | {"threads": 1}, "rows": rows, "misses": misses}
    (RESULTS / "t4-projection.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
