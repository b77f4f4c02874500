"""Speculative loading: guess the experts of layers to come from the hidden state of now (2312.17238, section 3.2).

Knows a model's routers and norms by the names that transformers gives them. Knows nothing of slots or copies: a guess
is a ranking of experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .errors import OptionError

#: when to guess, as `Prefetcher` takes it
MOMENTS = ("after",)
#: (hidden state before the experts `[T, H]`, router, norm before that router) -> logits `[T, experts]`
Predictor = Callable[[Tensor, nn.Module, nn.Module], Tensor]


def next_router(hidden: Tensor, router: nn.Module, norm: nn.Module) -> Tensor:
    """What a later layer's router would say if its layer began here: its own norm, then its own weights."""
    return nn.functional.linear(norm(hidden), router.weight)


@dataclass(frozen=True)
class Gate:
    """One layer's way from the residual stream to its experts; `block` is the whole decoder layer."""

    layer: int
    norm: nn.Module
    router: nn.Module
    block: nn.Module


def find_gates(model: nn.Module, experts: dict[str, int]) -> list[Gate]:
    """The gates of a model, by layer. experts: module name of each layer's experts -> layer.

    Raises OptionError for a family whose router or norm is not where Mixtral, Qwen-MoE and OLMoE have it.
    """
    gates = []
    for name, layer in experts.items():
        moe = model.get_submodule(name.rpartition(".")[0])
        block = model.get_submodule(name.rpartition(".")[0].rpartition(".")[0])
        router = getattr(moe, "gate", None) or getattr(moe, "router", None)
        norm = getattr(block, "post_attention_layernorm", None)
        if norm is None or getattr(router, "weight", None) is None or router.weight.ndim != 2:
            raise OptionError(
                "speculative loading does not know this family's router", found=type(moe).__name__,
                expected="a router `gate` and a norm `post_attention_layernorm`", hint="use prefetch=0",
            )  # fmt: skip
        gates.append(Gate(layer, norm, router, block))
    return gates


class Prefetcher:
    """Guesses the experts of the layers that come next, up to `look_ahead` layers ahead.

    n_experts: how many experts of each such layer to ask for. moments: when to guess: "before" a layer's own experts
    run (earlier), "after" them (more often right, see LOG.md; the embedding is what comes before layer 0), or both,
    the later guess then correcting the earlier one where its copy has not begun.
    start: called with (layer, experts, distance) for each guess.
    """

    def __init__(
        self, model: nn.Module, gates: list[Gate], start: Callable[[int, list[int], int], None], n_experts: int, look_ahead: int = 1,
        predictor: Predictor = next_router, moments: tuple[str, ...] = MOMENTS,
    ):  # fmt: skip
        self.n_experts, self.look_ahead, self.predictor, self.moments = (
            n_experts,
            look_ahead,
            predictor,
            moments,
        )
        self._start, self._gates = start, gates
        self._number = {gate.layer: number for number, gate in enumerate(gates)}
        self._hidden: Tensor | None = None
        self._hooks = [gate.norm.register_forward_pre_hook(self._see) for gate in gates]
        if "after" in moments:
            self._hooks.append(model.get_input_embeddings().register_forward_hook(self._after(-1)))
            self._hooks += [gate.block.register_forward_hook(self._after(n)) for n, gate in enumerate(gates)]

    def _see(self, norm: nn.Module, arguments: tuple) -> None:
        self._hidden = arguments[0]

    def _after(self, number: int):
        def hook(module: nn.Module, inputs: tuple, output) -> None:
            targets, ranked = self._rank(number, output[0] if isinstance(output, tuple) else output)
            self.start(targets, ranked.tolist() if targets else [])

        return hook

    @torch.no_grad()
    def _rank(self, number: int, hidden: Tensor) -> tuple[list[int], Tensor | None]:
        """Layers, and for each the numbers of its likeliest experts `[layers, n_experts]`, the likeliest first.

        With several tokens at hand, an expert's likelihood is its share of all tokens' routing.
        """
        hidden = hidden.reshape(-1, hidden.shape[-1])
        targets, ranked = self._gates[number + 1 : number + 1 + self.look_ahead], []
        for gate in targets:
            share = self.predictor(hidden, gate.router, gate.norm).float().softmax(-1).sum(0)
            ranked.append(share.topk(min(self.n_experts, share.numel())).indices)
        return [gate.layer for gate in targets], torch.stack(ranked) if ranked else None

    def rank_before(self, layer: int) -> tuple[list[int], Tensor | None]:
        """The guesses to make before this layer's experts run (see `_rank`); none if that is not a moment for them."""
        if "before" not in self.moments:
            return [], None
        return self._rank(self._number[layer], self._hidden)

    def start(self, layers: list[int], ranked: list[list[int]]) -> None:
        """Start the copies of guesses, the nearest layer's first."""
        for distance, (layer, experts) in enumerate(zip(layers, ranked), 1):
            self._start(layer, experts, distance)

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
