"""How well the experts of a layer can be guessed earlier: recall of speculative loading (2312.17238, figure 2, right).

Knows a model's routers and hidden states. It runs texts through the model once and compares many guesses with what the
routers then chose; nothing is copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mixtral_offload.errors import OptionError
from mixtral_offload.models.family import MoELayer

#: which hidden state a guess is made from
SOURCES = ("before", "normed", "after")


@dataclass(frozen=True)
class Recall:
    """recall: float64 [look-aheads, layers, E + 1], the share of needed experts among the first n guesses for a layer,
    made so many layers earlier; nan where there is no such layer. top_k: experts needed per token."""

    look_aheads: tuple[int, ...]
    recall: np.ndarray
    top_k: int
    n_tokens: int

    @property
    def n_experts(self) -> int:
        return self.recall.shape[2] - 1

    def average(self) -> np.ndarray:
        """Over layers: float64 [look-aheads, E + 1]."""
        return np.nanmean(self.recall, axis=1)

    def chance(self) -> np.ndarray:
        """What n guesses at random would find: float64 [E + 1]."""
        return np.arange(self.n_experts + 1) / self.n_experts


@dataclass
class States:
    """By layer: the residual before the experts, its normalised form, the residual after, all [N, H]; the router's
    choice [N, k]; and the embeddings [N, H] with the first token of each text marked."""

    before: list[Tensor]
    normed: list[Tensor]
    after: list[Tensor]
    chosen: list[Tensor]
    embedded: Tensor
    first: Tensor


@contextmanager
def _watching(model, layers: Sequence[MoELayer], seen: dict[str, list]):
    """Append what every layer sees to the lists of `seen`."""

    def keep(name, number, pick):
        return lambda module, inputs, output=None: seen[name][number].append(
            pick(inputs, output).detach().flatten(0, -2)
        )

    def first(value):
        return value[0] if isinstance(value, tuple) else value

    hooks = [model.get_input_embeddings().register_forward_hook(keep("embedded", 0, lambda i, o: o))]
    for number, layer in enumerate(layers):
        hooks.append(layer.router.norm.register_forward_pre_hook(keep("before", number, lambda i, o: i[0])))
        hooks.append(layer.router.norm.register_forward_hook(keep("normed", number, lambda i, o: o)))
        hooks.append(layer.router.module.register_forward_hook(keep("chosen", number, lambda i, o: o[2])))
        hooks.append(layer.block().register_forward_hook(keep("after", number, lambda i, o: first(o))))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.inference_mode()
def collect_states(model, layers: Sequence[MoELayer], texts: Sequence[Sequence[int]]) -> States:
    """Run texts (token ids) through the model and keep what the guesses need."""
    seen = {name: [[] for _ in layers] for name in ("before", "normed", "after", "chosen", "embedded")}
    first: list[bool] = []
    with _watching(model, layers, seen):
        for ids in texts:
            model(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False)
            first += [True] + [False] * (len(ids) - 1)
    joined = {name: [torch.cat(parts) for parts in by_layer if parts] for name, by_layer in seen.items()}
    embedded = joined.pop("embedded")[0]
    return States(**joined, embedded=embedded, first=torch.tensor(first))


def _found(logits: Tensor, chosen: Tensor) -> np.ndarray:
    """Mean share of the chosen among the n likeliest, for n from 0 to E: float64 [E + 1]."""
    place = logits.argsort(-1, descending=True).argsort(-1)  # [N, E] -> rank of each expert
    ranks = place.gather(-1, chosen).flatten().cpu().numpy()
    counts = np.bincount(ranks, minlength=logits.shape[-1])
    return np.concatenate([[0.0], counts.cumsum() / len(ranks)])


@torch.inference_mode()
def measure_recall(
    layers: Sequence[MoELayer],
    states: States,
    look_aheads: Sequence[int] = (1, 2, 10),
    source: str = "before",
) -> Recall:
    """Recall of guesses by each layer's own router from an earlier layer's hidden state.

    source: "before" the experts, through the later layer's norm; "normed": as this layer's norm left it, straight into
    the later router (the paper's way); "after" the experts, through the later layer's norm. Look-aheads that the model
    is too shallow for become its deepest one.
    """
    if source not in SOURCES:
        raise OptionError("unknown source of guesses", expected=", ".join(SOURCES), found=source)
    if len(layers) < 2:
        raise OptionError(
            "nothing to guess: the model has one layer with experts",
            expected="two or more",
            found=len(layers),
        )
    look_aheads = tuple(dict.fromkeys(min(ahead, len(layers) - 1) for ahead in look_aheads))
    n_experts = layers[0].router.weight.shape[0]
    recall = np.full((len(look_aheads), len(layers), n_experts + 1), np.nan)
    for row, ahead in enumerate(look_aheads):
        for number in range(len(layers) - ahead):
            hidden, target = getattr(states, source)[number], layers[number + ahead].router
            hidden = hidden if source == "normed" else target.norm(hidden)
            logits = torch.nn.functional.linear(hidden, target.weight)
            recall[row, number + ahead] = _found(logits, states.chosen[number + ahead])
    return Recall(look_aheads, recall, states.chosen[0].shape[-1], len(states.first))


@torch.inference_mode()
def first_layer_recall(layers: Sequence[MoELayer], states: States) -> dict[str, np.ndarray]:
    """The same for layer 0, which no earlier layer sees: from the previous token, and from the token's embedding."""
    router, later = layers[0].router, ~states.first
    chosen, weight = states.chosen[0][later], router.weight
    previous = torch.zeros(len(states.first), weight.shape[0], device=weight.device)
    previous.scatter_(1, states.chosen[0], 1.0)
    shifted = later.nonzero()[:, 0] - 1
    guesses = {
        "the previous token's experts": previous[shifted],
        "router on the previous token's last hidden state": router.norm(states.after[-1][shifted]) @ weight.T,
        "router on the token's embedding": router.norm(states.embedded[later]) @ weight.T,
    }
    return {name: _found(logits, chosen) for name, logits in guesses.items()}
