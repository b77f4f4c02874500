"""Routing replayed from a trace, for models of random weights, whose own routing is random.

Works on the experts modules of transformers' Mixtral and Qwen3-MoE: under this package's model and under
accelerate's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from mixtral_offload.core.trace import RoutingTrace

EXPERTS = (MixtralExperts, Qwen3MoeExperts)


def sticky_experts(
    n_tokens: int, n_layers: int, n_experts: int, top_k: int, stay: float, seed: int = 0
) -> np.ndarray:
    """Draw the experts of each token and layer: int16 [N, L, k].

    Each expert of the token before stays with probability `stay`; the others are drawn uniformly among those
    that did not stay (stay=0: chance).
    """
    random = np.random.default_rng(seed)
    layers = np.arange(n_layers)[:, None]
    experts = np.empty((n_tokens, n_layers, top_k), np.int16)
    for token in range(n_tokens):
        scores = random.random((n_layers, n_experts))
        if token:  # those that stay get the lowest scores, so the rest is a uniform draw
            scores[layers, experts[token - 1]] -= random.random((n_layers, top_k)) < stay
        experts[token] = np.argsort(scores, -1)[:, :top_k]
    return experts


class ForcedRouting:
    """Makes each pass of T tokens through a layer's experts use the trace's next T rows for that layer.

    The weights stay the router's own; the experts that it chose are ignored.

    Args:
        experts: int [N, L, k], for the model's layers in order.

    Attributes:
        position: Layer -> rows used so far.
    """

    def __init__(self, model: nn.Module, experts: np.ndarray):
        modules = [module for module in model.modules() if isinstance(module, EXPERTS)]
        if len(modules) != experts.shape[1]:
            raise ValueError(
                f"a trace of {experts.shape[1]} layers for a model with {len(modules)} MoE layers"
            )
        self.experts = torch.from_numpy(experts.astype(np.int64)).transpose(0, 1).contiguous()  # [L, N, k]
        self.position = dict.fromkeys(range(len(modules)), 0)
        for layer, module in enumerate(modules):
            module.register_forward_pre_hook(self._hook(layer))

    def reset(self) -> None:
        """Start at the beginning of the trace."""
        self.position = dict.fromkeys(self.position, 0)

    def _hook(self, layer: int):
        def hook(module: nn.Module, arguments: tuple) -> tuple:
            hidden, chosen, weights = arguments
            begin = self.position[layer]
            if begin + len(chosen) > self.experts.shape[1]:
                raise RuntimeError(
                    f"the trace has {self.experts.shape[1]} tokens, the model needs {begin + len(chosen)}"
                )
            self.experts = self.experts.to(chosen.device)
            self.position[layer] = begin + len(chosen)
            return hidden, self.experts[layer, begin : begin + len(chosen)], weights

        return hook


class ForcedPredictions:
    """A predictor for `Prefetcher` that names each needed expert with a stated probability.

    Args:
        routing: Whose rows are needed.
        recall: That probability, if `top_k` experts are predicted.
    """

    def __init__(self, routing: ForcedRouting, n_experts: int, recall: float, seed: int = 0):
        self._routing = routing
        random = np.random.default_rng((seed, 1))
        needed = routing.experts.cpu().numpy()  # [L, N, k]
        logits = random.random((*needed.shape[:2], n_experts), np.float32)
        # right ones above all noise, missed ones below
        shift = np.where(random.random(needed.shape) < recall, 1, -1)
        np.put_along_axis(logits, needed, np.take_along_axis(logits, needed, -1) + shift, -1)
        self._logits = torch.from_numpy(logits)

    def __call__(self, hidden: Tensor, layers: Sequence) -> Tensor:
        """`hidden [T, H]` -> `[layers, T, experts]` for the rows that these layers will use next."""
        if self._logits.device != hidden.device:
            self._logits = self._logits.to(hidden.device)
        position = self._routing.position
        return torch.stack([self._logits[of.number, position[of.number] :][: len(hidden)] for of in layers])


def forced_trace(experts: np.ndarray, n_prompt: int, settings: dict) -> RoutingTrace:
    """The trace that a run of this routing must record: a pass of `n_prompt` tokens, then one for each token.

    experts: [N, L, k]. settings: `model.offload.settings()`.
    """
    n_tokens, n_layers, _ = experts.shape
    passes = np.maximum(np.arange(n_tokens) - n_prompt + 1, 0).astype(np.int32)
    layers = np.arange(n_layers)[None, :, None]
    keys = (passes[:, None, None] * n_layers + layers) * settings["n_experts"] + experts
    order, expert = np.divmod(np.unique(keys), settings["n_experts"])
    number, layer = np.divmod(order, n_layers)
    n_uses, n_passes = len(expert), n_tokens - n_prompt + 1
    trace = RoutingTrace.from_routing(
        experts, np.ones(experts.shape), **{k: settings[k] for k in ("n_experts", "expert_bytes")}
    )
    return replace(
        trace,
        passes=passes,
        use_pass=number.astype(np.int32),
        use_layer=layer.astype(np.int32),
        use_expert=expert.astype(np.int32),
        use_outcome=np.zeros(n_uses, np.uint8),
        use_wait_s=np.zeros(n_uses),
        use_at_s=np.zeros(n_uses),
        use_bytes=np.zeros(n_uses, np.int64),
        use_copy_s=np.full((n_uses, 2), np.nan),
        spans=np.zeros((n_passes, n_layers, 2)),
        settings=settings,
    )
