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

#: (hidden state before the experts `[T, H]`, router, norm before that router) -> logits `[T, experts]`
Predictor = Callable[[Tensor, nn.Module, nn.Module], Tensor]


def next_router(hidden: Tensor, router: nn.Module, norm: nn.Module) -> Tensor:
    """What a later layer's router would say if its layer began here: its own norm, then its own weights."""
    return nn.functional.linear(norm(hidden), router.weight)


@dataclass(frozen=True)
class Gate:
    """One layer's way from the residual stream to its experts."""

    layer: int
    norm: nn.Module
    router: nn.Module


def find_gates(model: nn.Module, experts: dict[str, int]) -> list[Gate]:
    """The gates of a model, by layer. experts: module name of each layer's experts -> layer.

    Raises OptionError for a family whose router or norm is not where Mixtral, Qwen-MoE and OLMoE have it.
    """
    gates = []
    for name, layer in experts.items():
        block = model.get_submodule(name.rpartition(".")[0])
        parent = model.get_submodule(name.rpartition(".")[0].rpartition(".")[0])
        router = getattr(block, "gate", None) or getattr(block, "router", None)
        norm = getattr(parent, "post_attention_layernorm", None)
        if norm is None or getattr(router, "weight", None) is None or router.weight.ndim != 2:
            raise OptionError(
                "speculative loading does not know this family's router", found=type(block).__name__,
                expected="a router `gate` and a norm `post_attention_layernorm`", hint="use prefetch=0",
            )  # fmt: skip
        gates.append(Gate(layer, norm, router))
    return gates


class Prefetcher:
    """Ranks the experts of the layers that come `look_ahead` and fewer layers later.

    n_experts: how many experts of each such layer to ask for. look_ahead: 1 is the next layer only; layers are counted
    on into the next token, whose first layers are so predicted from this token's last ones (`wrap`).
    """

    def __init__(
        self, gates: list[Gate], n_experts: int, look_ahead: int = 1, predictor: Predictor = next_router, wrap: bool = True,
    ):  # fmt: skip
        self.n_experts, self.look_ahead, self.predictor, self.wrap = n_experts, look_ahead, predictor, wrap
        self._gates = gates
        self._number = {gate.layer: number for number, gate in enumerate(gates)}
        self._hidden: Tensor | None = None
        self._hooks = [gate.norm.register_forward_pre_hook(self._see) for gate in gates]

    def _see(self, norm: nn.Module, arguments: tuple) -> None:
        self._hidden = arguments[0]

    def targets(self, layer: int) -> list[Gate]:
        """The gates of the layers to guess for while `layer` runs, the nearest first."""
        after = range(self._number[layer] + 1, self._number[layer] + 1 + self.look_ahead)
        if not self.wrap:
            after = [number for number in after if number < len(self._gates)]
        found = [self._gates[number % len(self._gates)] for number in after]
        return [gate for gate in found if gate.layer != layer]

    @torch.no_grad()
    def rank(self, layer: int) -> tuple[list[int], Tensor]:
        """Layers, and for each the numbers of its likeliest experts `[layers, n_experts]`, the likeliest first.

        With several tokens at hand, an expert's likelihood is its share of all tokens' routing. For the next token,
        only the last token counts.
        """
        hidden = self._hidden.reshape(-1, self._hidden.shape[-1])
        targets = self.targets(layer)
        ranked = []
        for gate in targets:
            next_token = self._number[gate.layer] <= self._number[layer]
            logits = self.predictor(hidden[-1:] if next_token else hidden, gate.router, gate.norm)
            share = logits.float().softmax(-1).sum(0)
            ranked.append(share.topk(min(self.n_experts, share.numel())).indices)
        return [gate.layer for gate in targets], torch.stack(ranked) if ranked else None

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
