"""How close copies and compute come to the best schedule: time per token, its timed replay, and the floor.

    python benchmarks/overlap.py [--cache-sizes 2 4 6] [--ratio 5.5]

The shipped model behind a link throttled until the copy of an expert takes `ratio` times one layer's compute.
The floor of a token is the larger of its compute, measured with everything on the device, and of the copies
that the same cache needs without predictions. Prints a table and the host's own time per layer; writes
benchmarks/results/overlap.json and two pictures: bars over the floor, and one token of the replay, on the
device and on the link.
"""

import argparse
import json
import statistics
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from machine import machine
from matplotlib.figure import Figure

from mixtral_offload import from_pretrained, load_tokenizer, record
from mixtral_offload.analysis.plots.timeline import plot_replayed_pass
from mixtral_offload.analysis.timed_replay import TimedReplay, timed_replay
from mixtral_offload.core.costs import DeviceCosts
from mixtral_offload.core.policies import staging_rows
from mixtral_offload.experiments.ablation import PROMPTS, encode_prompt, generate
from mixtral_offload.experiments.baselines import make_variants, switched, throttled
from mixtral_offload.experiments.calibration import measure_costs

RESULTS = Path(__file__).parent / "results"
AHEAD = (0, 1, 2, 3)  # layers ahead to predict; 0: no predictions
DRAWN = 4  # the cache size whose timeline is drawn


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache-sizes", type=int, nargs="+", default=(2, 4, 6))
    parser.add_argument("--ratio", type=float, default=5.5, help="one expert's copy over one layer's compute")
    parser.add_argument("--prefetch", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument(
        "--compile", action="store_true", help="experts by compiled products, small as they are"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS / "overlap.json")
    return parser.parse_args()


def paced(costs: DeviceCosts, token_s: float, n_layers: int = 6, top_k: int = 2) -> DeviceCosts:
    """Scale the compute costs to the speed of a moment ago: the machine's speed changes within minutes."""
    scale = token_s / (costs.token_s + n_layers * (costs.attention_s + top_k * costs.expert_s))
    return replace(
        costs,
        **{
            name: scale * getattr(costs, name) for name in ("token_s", "attention_s", "expert_s", "predict_s")
        },
    )


def one_size(model, resident, prompts, k: int, costs, arguments) -> tuple[dict, TimedReplay]:
    """Measure every look-ahead and the model with everything on the device, in turns.

    Returns:
        The row of the result, and the last replay with predictions one layer ahead.
    """
    caches = make_variants(model, k, staging_rows(arguments.prefetch, max(AHEAD)))
    seconds = {ahead: [] for ahead in (*AHEAD, "resident", "naive")}
    replayed, misses, wasted, moved = ({ahead: [] for ahead in AHEAD} for _ in range(4))
    drawn = None
    for _ in range(arguments.repeats):
        for prompt in prompts:
            seconds["resident"].append(generate(resident, [prompt], arguments.tokens)[0])
            now = paced(costs, seconds["resident"][-1])
            with switched(model, caches["naive"]):
                seconds["naive"].append(generate(model, [prompt], 8)[0])
            for ahead in AHEAD:
                predictions = {"n_experts": arguments.prefetch, "look_ahead": ahead} if ahead else None
                with switched(model, caches["full" if ahead else "without prefetch"], predictions):
                    with record(model) as recording:
                        seconds[ahead].append(generate(model, [prompt], arguments.tokens)[0])
                    again = {"prefetch": arguments.prefetch, "look_ahead": ahead} if ahead else {}
                    replay = timed_replay(recording.trace, now, cache_size=k, keep_events=ahead == 1, **again)
                    drawn = replay if ahead == 1 else drawn
                    n = replay.decoding.sum()
                    replayed[ahead].append(replay.time_per_token)
                    misses[ahead].append(replay.pass_misses[replay.decoding].sum() / n)
                    stats = model.offload.stats
                    wasted[ahead].append(stats.wasted_bytes / replay.pass_tokens.size)
                    moved[ahead].append(stats.bytes_moved / replay.pass_tokens.size)
    median = {name: statistics.median(of) for name, of in seconds.items()}
    floor = max(median["resident"], statistics.mean(misses[0]) * costs.copy_s)
    rows = {
        ahead: {"s": median[ahead], "replayed_s": statistics.median(replayed[ahead]),
                "over_replay": statistics.median(a / b for a, b in zip(seconds[ahead], replayed[ahead])),
                "over_floor": statistics.mean(seconds[ahead]) / floor,
                "replay_over_floor": statistics.mean(replayed[ahead]) / floor,
                "moved_bytes": statistics.mean(moved[ahead]), "wasted_bytes": statistics.mean(wasted[ahead])}
        for ahead in AHEAD
    }  # fmt: skip
    row = {
        "floor_s": floor,
        "resident_s": median["resident"],
        "misses": statistics.mean(misses[0]),
        "ahead": rows,
        "naive_s": median["naive"],
        "over_naive": median["naive"] / min(median[ahead] for ahead in AHEAD),
    }
    return row, drawn


def plot_over_floor(result: dict) -> tuple[Figure, np.ndarray]:
    """Plot time per token over the floor, measured and replayed: [cache sizes, look-aheads, 2]."""
    shown = np.array([[(row["over_floor"], row["replay_over_floor"]) for row in of["ahead"].values()]
                      for of in result["sizes"].values()])  # fmt: skip
    figure = Figure(figsize=(8, 4), layout="constrained")
    for axes, size, values in zip(
        figure.subplots(1, len(shown), sharey=True, squeeze=False)[0], result["sizes"], shown
    ):
        for shift, column, label in ((-0.2, 0, "measured"), (0.2, 1, "timed replay")):
            axes.bar(np.arange(len(AHEAD)) + shift, values[:, column], 0.38, label=label)
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_xticks(range(len(AHEAD)), AHEAD)
        axes.set(title=f"{size} experts of a layer cached", xlabel="look-ahead, layers")
    figure.axes[0].set_ylabel("time per token over the floor")
    figure.axes[-1].legend(loc="lower right")
    return figure, shown


def main() -> None:
    arguments = parse()
    if arguments.device == "cpu":
        torch.set_num_threads(1)
    tokenizer = load_tokenizer()
    same = {"device": arguments.device, "compile": arguments.compile}
    most = {
        "cache_size": max(arguments.cache_sizes),
        "prefetch": arguments.prefetch,
        "look_ahead": max(AHEAD),
    }
    model, resident = from_pretrained(store="ram", **most, **same), from_pretrained(cache_size=8, **same)
    prompts = [encode_prompt(tokenizer, text).to(model.device) for text in PROMPTS]
    result = {
        "machine": machine(arguments.device),
        "sizes": {},
        "settings": {k: str(v) for k, v in vars(arguments).items() if k != "out"},
    }
    with ExitStack() as stack:
        # the ratio is to a layer's share of a token as users generate it, everything on the device
        layer_s = statistics.median(generate(resident, prompts, arguments.tokens)[0] for _ in range(3)) / 6
        stack.enter_context(throttled(model, arguments.ratio, layer_s))
        costs = measure_costs(model)
        result |= {"costs": vars(costs), "layer_s": layer_s, "copy_over_layer": costs.copy_s / layer_s}
        print(f"{costs}\none layer {1e3 * layer_s:.2f} ms, one copy {1e3 * costs.copy_s:.2f} ms", flush=True)
        for k in arguments.cache_sizes:
            of, drawn = one_size(model, resident, prompts, k, costs, arguments)
            result["sizes"][k] = of
            if k == DRAWN:
                name = arguments.out.with_name(f"{arguments.out.stem}-timeline.png")
                plot_replayed_pass(drawn)[0].savefig(name, dpi=120)
            print(
                f"cache of {k}: {of['misses']:.2f} misses a token, floor {1e3 * of['floor_s']:.1f} ms, "
                f"everything resident {1e3 * of['resident_s']:.1f} ms, "
                f"{of['over_naive']:.1f} times as fast as the naive way"
            )
            for ahead, row in of["ahead"].items():
                print(
                    f"  {ahead} ahead: {1e3 * row['s']:5.1f} ms, {row['over_replay']:.2f} of its replay, "
                    f"{row['over_floor']:.2f} of the floor (replay {row['replay_over_floor']:.2f}); "
                    f"{row['wasted_bytes'] / 1e3:.0f} of {row['moved_bytes'] / 1e3:.0f} kB wasted",
                    flush=True,
                )
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    plot_over_floor(result)[0].savefig(arguments.out.with_suffix(".png"), dpi=120)


if __name__ == "__main__":
    main()
