"""How well a layer's experts can be predicted earlier: recall of predictions (2312.17238, figure 2, right).

Runs texts through a model once and compares predictions with what its routers chose; nothing is copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from mixtral_offload.errors import OptionError
from mixtral_offload.models.family import MoELayer, Router, check_routers

#: which hidden state a prediction is made from, see `measure_recall`
SOURCES = ("before", "normed", "after")


@dataclass(frozen=True)
class Recall:
    """Recall by look-ahead, layer and number of predictions.

    Attributes:
        look_aheads: How many layers earlier the predictions are made.
        recall: float64 `[look-aheads, L, E + 1]`, the share of needed experts among the n most probable; nan
            where no layer is that far before.
        top_k: Experts needed per token.
    """

    look_aheads: tuple[int, ...]
    recall: np.ndarray
    top_k: int
    n_tokens: int

    @property
    def n_experts(self) -> int:
        """Experts of a layer."""
        return self.recall.shape[2] - 1

    def average(self) -> np.ndarray:
        """Average over layers: float64 `[look-aheads, E + 1]`."""
        return np.nanmean(self.recall, axis=1)

    def chance(self) -> np.ndarray:
        """Recall of n random experts: float64 `[E + 1]`."""
        return np.arange(self.n_experts + 1) / self.n_experts


@dataclass
class States:
    """What predictions are made from, and what came true; lists by layer.

    Attributes:
        before: The residual before the experts, `[N, H]`.
        normed: Its normalised form, `[N, H]`.
        after: The residual after the experts, `[N, H]`.
        chosen: The router's choice, `[N, k]`.
        embedded: The embeddings, `[N, H]`.
        first: The first token of each text: bool `[N]`.
    """

    before: list[Tensor]
    normed: list[Tensor]
    after: list[Tensor]
    chosen: list[Tensor]
    embedded: Tensor
    first: Tensor


Pick = Callable[[Any, Any], Any]  # of a module's inputs and output, one


def _router(layer: MoELayer) -> Router:
    assert layer.router is not None  # see `check_routers`
    return layer.router


@contextmanager
def _watching(
    model: PreTrainedModel, layers: Sequence[MoELayer], seen: dict[str, list[list[Tensor]]]
) -> Iterator[None]:
    """Append what every layer sees to the lists of `seen`."""

    def keep(name: str, number: int, pick: Pick) -> Callable[..., None]:
        def hook(module: torch.nn.Module, inputs: Any, output: Any = None) -> None:
            seen[name][number].append(pick(inputs, output).detach().flatten(0, -2))

        return hook

    def first(value: Any) -> Any:
        return value[0] if isinstance(value, tuple) else value

    hooks = [model.get_input_embeddings().register_forward_hook(keep("embedded", 0, lambda i, o: o))]
    for number, layer in enumerate(layers):
        router, block = _router(layer), layer.block()
        assert block is not None  # the model holds it
        hooks.append(router.norm.register_forward_pre_hook(keep("before", number, lambda i, o: i[0])))
        hooks.append(router.norm.register_forward_hook(keep("normed", number, lambda i, o: o)))
        hooks.append(router.module.register_forward_hook(keep("chosen", number, lambda i, o: o[2])))
        hooks.append(block.register_forward_hook(keep("after", number, lambda i, o: first(o))))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.inference_mode()
def collect_states(
    model: PreTrainedModel, layers: Sequence[MoELayer], texts: Sequence[Sequence[int]]
) -> States:
    """Run texts (token ids) through the model and keep what predictions need.

    Raises:
        OptionError: For a family whose routers are not known.
    """
    check_routers(layers)
    names = ("before", "normed", "after", "chosen", "embedded")
    seen: dict[str, list[list[Tensor]]] = {name: [[] for _ in layers] for name in names}
    first: list[bool] = []
    with _watching(model, layers, seen):
        for ids in texts:
            model(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False)
            first += [True] + [False] * (len(ids) - 1)
    joined = {name: [torch.cat(parts) for parts in by_layer if parts] for name, by_layer in seen.items()}
    embedded = joined.pop("embedded")[0]
    return States(**joined, embedded=embedded, first=torch.tensor(first))


def _found(logits: Tensor, chosen: Tensor) -> np.ndarray:
    """Mean share of the chosen among the n most probable, for n from 0 to E: float64 `[E + 1]`."""
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
    """Measure the recall of predictions by each layer's own router from an earlier layer's hidden state.

    Args:
        look_aheads: Those that the model is too shallow for become its deepest one.
        source: "before" the experts, through the later layer's norm; "normed": as this layer's norm left it,
            without the later one (the paper's way); "after" the experts, through the later layer's norm.

    Raises:
        OptionError: The source is unknown, or the model has only one MoE layer.
    """
    if source not in SOURCES:
        raise OptionError("unknown source of predictions", expected=", ".join(SOURCES), found=source)
    if len(layers) < 2:
        what = "nothing to predict: the model has one layer with experts"
        raise OptionError(what, expected="two or more", found=len(layers))
    look_aheads = tuple(dict.fromkeys(min(ahead, len(layers) - 1) for ahead in look_aheads))
    n_experts = _router(layers[0]).weight.shape[0]
    recall = np.full((len(look_aheads), len(layers), n_experts + 1), np.nan)
    for row, ahead in enumerate(look_aheads):
        for number in range(len(layers) - ahead):
            hidden, target = getattr(states, source)[number], _router(layers[number + ahead])
            hidden = hidden if source == "normed" else target.norm(hidden)
            logits = torch.nn.functional.linear(hidden, target.weight)
            recall[row, number + ahead] = _found(logits, states.chosen[number + ahead])
    return Recall(look_aheads, recall, states.chosen[0].shape[-1], len(states.first))


@torch.inference_mode()
def first_layer_recall(layers: Sequence[MoELayer], states: States) -> dict[str, np.ndarray]:
    """Measure recall for layer 0, from the previous token and from the token's embedding.

    Returns:
        source -> float64 `[E + 1]`, as `Recall.recall`.
    """
    router, later = _router(layers[0]), ~states.first
    chosen, weight = states.chosen[0][later], router.weight
    previous = weight.new_zeros(len(states.first), weight.shape[0], dtype=torch.float32)
    previous.scatter_(1, states.chosen[0], 1.0)
    shifted = later.nonzero()[:, 0] - 1
    predicted = {
        "the previous token's experts": previous[shifted],
        "router on the previous token's last hidden state": router.norm(states.after[-1][shifted]) @ weight.T,
        "router on the token's embedding": router.norm(states.embedded[later]) @ weight.T,
    }
    return {name: _found(logits, chosen) for name, logits in predicted.items()}
