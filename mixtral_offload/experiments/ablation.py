"""What the expert cache and predictions are each worth on this machine: table 2 of 2312.17238.

Prompts, turns and comparisons; `experiments/baselines.py` makes the variants.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import BatchEncoding, LogitsProcessorList, PreTrainedTokenizerBase

from mixtral_offload.core.counters import CacheStats
from mixtral_offload.core.policies import staging_rows
from mixtral_offload.errors import OptionError
from mixtral_offload.experiments.baselines import (
    check_can_switch,
    check_same,
    copy_seconds,
    layer_seconds,
    make_variants,
    switched,
    throttled,
)
from mixtral_offload.runtime.cache import ExpertCache
from mixtral_offload.runtime.offload import OffloadedModel
from mixtral_offload.runtime.prefetch import MOMENTS
from mixtral_offload.units import check_whole

#: tokens/s on a T4 at 2 bits (2312.17238, table 2)
PAPER_TABLE_2 = {
    "full": 2.092,
    "without prefetch": 1.567,
    "without cache and prefetch": 1.168,
    "naive": 0.661,
}
RESIDENT = "everything resident"
#: one expert's copy over one layer's compute on a T4: 66.4 MB at 12 GB/s take 5.5 ms, a layer about 1 ms
T4_RATIO = 5.5
PROMPTS = (
    "Tell me a story about a fox.",
    "How do I sort a list in Python?",
    "Tell me a story about a boy named Tom.",
    "Who are you and what can you do?",
)

Prompt = Mapping[str, Any]  # what the tokenizer returns


@dataclass(frozen=True)
class Ablation:
    """Result of `ablate`; `str` of it is a table.

    Attributes:
        tokens_per_s: variant -> decoding speed, from the median of its turns.
        prefetch_saves: Share of time that predictions save: quartiles over pairs of turns.
        seconds_per_token: variant -> one number for each turn, repeat by repeat, prompt by prompt.
        counters: variant -> sums of its `CacheStats` over all turns, the prompts' own passes included.
        layer_s: One layer's compute for one token, in seconds, measured before the turns.
        copy_s: One expert's copy, likewise.
        settings: Of the run.
    """

    tokens_per_s: dict[str, float]
    prefetch_saves: list[float]
    seconds_per_token: dict[str, list[float]]
    counters: dict[str, dict[str, float]]
    layer_s: float
    copy_s: float
    settings: dict[str, Any]

    def over_naive(self, name: str) -> float:
        """Return a variant's speed as a multiple of the naive one's."""
        return self.tokens_per_s[name] / self.tokens_per_s["naive"]

    def to_json(self) -> str:
        """Return all of it as JSON: `Ablation(**json.loads(text))` is equal to this."""
        return json.dumps(asdict(self), indent=1)

    def __str__(self) -> str:
        lines = [f"{'':28}tokens/s  over naive  paper's T4, over naive  hits  MB moved (wasted)"]
        for name, speed in self.tokens_per_s.items():
            paper = f"{PAPER_TABLE_2[name] / PAPER_TABLE_2['naive']:.2f}" if name in PAPER_TABLE_2 else ""
            row, rest = self.counters.get(name), ""
            if row:
                hit_rate = row["hits"] / (row["hits"] + row["misses"])
                moved, wasted = row["bytes_moved"] / 1e6, row["wasted_bytes"] / 1e6
                rest = f"{hit_rate:5.2f} {moved:8.0f} ({wasted:.0f})"
            line = f"{name:28}{speed:8.2f}  {self.over_naive(name):10.2f}  {paper:>22}  {rest}"
            lines.append(line.rstrip())
        low, median, high = (f"{share:.1%}" for share in self.prefetch_saves)
        lines += [
            f"prefetch saves {median} of the time (median of pairs; quartiles {low} and {high})",
            f"one expert's copy {1e3 * self.copy_s:.2f} ms, one layer's compute {1e3 * self.layer_s:.2f} ms",
        ]
        return "\n".join(lines)


def ablate(
    model: OffloadedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str] = PROMPTS,
    *,
    cache_size: int,
    resident: OffloadedModel | None = None,
    prefetch: int = 2,
    look_ahead: int = 1,
    tokens: int = 40,
    naive_tokens: int = 8,
    repeats: int = 3,
    ratio: float | str | None = "auto",
    moments: tuple[str, ...] = MOMENTS,
) -> Ablation:
    """Measure table 2 of 2312.17238 on this machine: cache and predictions, without one, without both, naive.

    All variants answer the same prompts greedily, in turns, from the model's own store and in its own slots
    (device memory is taken only for slots that it lacks). Only decoding is timed. Resident experts stay so in
    every variant. The model's cache comes back empty; nothing else may use the model meanwhile.

    Args:
        cache_size: Experts of each layer on the device.
        resident: The same model with every expert on the device, for one more row and for answers to compare
            with.
        prefetch, look_ahead, moments: As for `Prefetcher`.
        tokens, naive_tokens: To generate for each prompt.
        ratio: Throttle the link until one expert's copy takes this multiple of one layer's compute; None: the
            link as it is; "auto": T4_RATIO on the CPU unless the model was built with `throttle`, else None.

    Raises:
        OptionError: For what cannot be measured.
        CapacityError: The device is too small.
        OffloadError: An answer depends on the variant.
    """
    texts = [prompts] if isinstance(prompts, str) else [*prompts]
    counts = {
        "cache_size": cache_size,
        "prefetch": prefetch,
        "look_ahead": look_ahead,
        "tokens": tokens,
        "naive_tokens": naive_tokens,
        "repeats": repeats,
    }
    _check(model, resident, texts, counts)
    if ratio == "auto":
        is_slow = model.device.type == "cuda" or model.offload.options.throttle is not None
        ratio = None if is_slow else T4_RATIO
    if isinstance(ratio, str):
        raise OptionError("impossible ratio", expected='more than 0, None or "auto"', found=ratio)
    encoded = [encode_prompt(tokenizer, text).to(model.device) for text in texts]
    with throttled(model, ratio):
        layer_s, copy_s = layer_seconds(model), copy_seconds(model)
        caches = make_variants(model, cache_size, staging_rows(prefetch, look_ahead))
        seconds, counters = _take_turns(model, resident, caches, encoded, counts, tuple(moments))
    settings: dict[str, Any] = counts | {"moments": [*moments], "ratio": ratio, "n_prompts": len(texts)}
    settings |= {"model": model.offload.checkpoint.folder.name, "device": str(model.offload.options.device)}
    speed = {name: 1 / statistics.median(taken) for name, taken in seconds.items()}
    saved = [1 - a / b for a, b in zip(seconds["full"], seconds["without prefetch"])]
    quartiles = statistics.quantiles(saved) if len(saved) > 1 else saved * 3
    return Ablation(speed, quartiles, seconds, counters, layer_s, copy_s, settings)


def _check(
    model: OffloadedModel, resident: OffloadedModel | None, texts: list[str], counts: dict[str, int]
) -> None:
    offload = model.offload
    check_can_switch(model, "ablate", "there is nothing to ablate")
    if resident is not None and not (resident.offload.plan.store is None and _is_same(resident, model)):
        raise OptionError(
            "`resident` must be the same model with every expert on the device",
            found=resident.offload.plan,
            hint=f"build it with the same options, and cache_size={offload.checkpoint.n_experts}",
        )
    if not texts:
        raise OptionError("no prompts", expected="one or more texts")
    least = {"cache_size": offload.checkpoint.top_k, "tokens": 2, "naive_tokens": 2}
    most = {"cache_size": offload.checkpoint.n_experts, "naive_tokens": counts["tokens"]}
    for name, n in counts.items():
        check_whole(name, n, least.get(name, 1), most.get(name))


def _is_same(*models: OffloadedModel) -> bool:
    offloads = [model.offload for model in models]
    return len({(of.checkpoint.folder, of.options.device, of.options.dtype) for of in offloads}) == 1


def _take_turns(
    model: OffloadedModel,
    resident: OffloadedModel | None,
    caches: dict[str, ExpertCache],
    prompts: Sequence[Prompt],
    counts: dict[str, int],
    moments: tuple[str, ...],
) -> tuple[dict[str, list[float]], dict[str, dict[str, float]]]:
    """Run all variants in turn with each prompt: (seconds per token of each turn, counters) by variant."""
    predict = {"n_experts": counts["prefetch"], "look_ahead": counts["look_ahead"], "moments": moments}
    runs: dict[str, ExpertCache | None] = {**({} if resident is None else {RESIDENT: None}), **caches}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    counters, expected = {name: CacheStats() for name in caches}, dict[int, list[int]]()
    n_turns = counts["repeats"] * len(prompts) * len(runs)
    bar = tqdm(total=n_turns, unit="turn", desc="ablation", disable=not model.offload.options.progress)
    for _ in range(counts["repeats"]):
        for number, prompt in enumerate(prompts):
            for name, cache in runs.items():
                n_tokens = counts["naive_tokens" if name == "naive" else "tokens"]
                if cache is None:
                    assert resident is not None
                    taken, (answer,) = generate(resident, [prompt], n_tokens)
                else:
                    with switched(model, cache, predict if cache.n_staging else None):
                        taken, (answer,) = generate(model, [prompt], n_tokens)
                    counters[name] += cache.stats
                found, first = answer[0].tolist(), expected.setdefault(number, answer[0].tolist())
                check_same(f"the variant: {name}", f"prompt {number}", found, first[: len(found)])
                seconds[name].append(taken)
                bar.update()
    bar.close()
    return seconds, {name: vars(of) for name, of in counters.items()}


@torch.inference_mode()
def generate(model: OffloadedModel, prompts: Sequence[Prompt], n_tokens: int) -> tuple[float, list[Tensor]]:
    """Generate greedily.

    Args:
        prompts: As the tokenizer gives them.

    Returns:
        Seconds per token after the first of each prompt, and the ids `[1, T]` of each, prompt and answer.
    """
    seconds, out = 0.0, []
    length = {"max_new_tokens": n_tokens, "min_new_tokens": n_tokens, "do_sample": False}
    for prompt in prompts:
        times: list[float] = []

        def stamp(ids: Tensor, scores: Tensor, times: list[float] = times) -> Tensor:
            times.append(time.perf_counter())
            return scores

        # nothing is padded; without the token, transformers warns in each call
        stamps = LogitsProcessorList([stamp])
        out.append(model.generate(**prompt, **length, pad_token_id=0, logits_processor=stamps))
        seconds += times[-1] - times[0]
    return seconds / (n_tokens - 1) / len(prompts), out


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> BatchEncoding:
    """Encode a question with the chat template, as `generate` takes it."""
    message = [{"role": "user", "content": text}]
    encoded = tokenizer.apply_chat_template(
        message, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    assert isinstance(encoded, BatchEncoding)  # because of return_dict
    return encoded
