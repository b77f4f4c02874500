"""A projection of Mixtral-8x7B on Colab's free T4, from byte counts, rates and a timed replay.

    python benchmarks/t4.py

No GPU is used. Plans are those of `mixtral-offload plan` for 15 GB and for the 15.8 GB that a T4 has, with 10
GB of RAM (of Colab's 12.7, Python and CUDA take the rest); links of 12 GB/s (PCIe 3.0 x16) and 6; 2- and
3-bit experts; routing like Mixtral's (`synthetic.CURVES`); kernels at half of 320 GB/s (assumed). The host's
time per layer is measured here: the shipped model's decoding layer with everything on the device, mostly
Python and launches. Prints a table and writes benchmarks/results/t4-projection.json and a picture of time per
token over slots and look-ahead.
"""

import json
import platform
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch
from synthetic import mixtral_config
from transformers import AutoConfig

from mixtral_offload import from_pretrained
from mixtral_offload.analysis.planner import PlanRequest, answer, expected_trace
from mixtral_offload.analysis.plots.timeline import plot_time_over_slots
from mixtral_offload.errors import CapacityError
from mixtral_offload.experiments.baselines import layer_seconds
from mixtral_offload.models.sizes import model_sizes

RESULTS = Path(__file__).parent / "results"
VRAM, RAM = ("15GB", "15.8GB"), "10GB"
LOOK_AHEADS = (1, 3)


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


def main() -> None:
    torch.set_num_threads(1)
    host_s = layer_seconds(from_pretrained(cache_size=2, store="ram"), 40)
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
    result = {"host_s": host_s, "machine": f"{platform.machine()}, 1 thread", "rows": rows}
    (RESULTS / "t4-projection.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
