"""Predict the experts of coming layers from the current hidden state (2312.17238, section 3.2).

Knows the routers of a model's layers. Knows nothing of slots or copies: a prediction is a ranking of experts.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from mixtral_offload.models.family import MoELayer, Router
from mixtral_offload.runtime.pass_state import Pass, Passes

#: default of `Prefetcher`
MOMENTS = ("after",)
#: (current hidden state `[T, H]`, layers to predict) -> logits `[layers, T, experts]`
Predictor = Callable[[Tensor, Sequence[MoELayer]], Tensor]


def next_router(hidden: Tensor, layers: Sequence[MoELayer]) -> Tensor:
    """Apply the later layers' norms and routers to the current hidden state.

    Args:
        hidden: `[T, H]`.
        layers: Layers to predict.

    Returns:
        Logits `[layers, T, experts]`.
    """
    return torch.stack([router(hidden) for router in _routers(layers)])


class FoldedRouters:
    """`next_router` for RMS norms, in the same few operations for any number of layers.

    Each norm's weight is folded into its router's; the rest of the norm is the same for all layers. For a
    single token it is left out: one factor for all logits does not change their order.
    """

    def __init__(self) -> None:
        #: by the first layer to predict, which determines the others
        self._folded: dict[int, Tensor] = {}

    def __call__(self, hidden: Tensor, layers: Sequence[MoELayer]) -> Tensor:
        """See `next_router`."""
        first, routers = layers[0].number, _routers(layers)
        folded = self._folded.get(first)
        if folded is None or len(folded) != len(layers) * len(routers[0].weight):
            norms = [router.norm.get_parameter("weight") for router in routers]
            weights = [router.weight.float() * norm.float() for router, norm in zip(routers, norms)]
            folded = self._folded[first] = torch.cat(weights)  # [layers * experts, H]
        x = hidden.float()
        if len(x) > 1:
            x = nn.functional.rms_norm(x, x.shape[-1:], eps=routers[0].epsilon)
        return nn.functional.linear(x, folded).view(len(x), len(layers), -1).transpose(0, 1)


def default_predictor(layers: Sequence[MoELayer]) -> Predictor:
    """Return folded routers if every norm is an RMS norm, else `next_router`."""
    is_rms = all(router.epsilon is not None for router in _routers(layers))
    return FoldedRouters() if is_rms else next_router


def _routers(layers: Sequence[MoELayer]) -> list[Router]:
    """The layers' routers, of which there is one each: see `check_routers`."""
    return [layer.router for layer in layers if layer.router is not None]


class HostCopy:
    """Copies a tensor to the host while the host goes on; does nothing on the CPU."""

    def __init__(self, tensor: Tensor):
        self._tensor = tensor
        self._event: torch.cuda.Event | None = None
        if tensor.is_cuda:
            self._tensor = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._tensor.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.current_stream(tensor.device).record_event()

    def tolist(self) -> list:
        """Wait until the numbers have arrived, and return them."""
        if self._event is not None:
            self._event.synchronize()
        return self._tensor.tolist()


class Prefetcher:
    """Predicts the experts of coming layers, in passes of the model only.

    A prompt needs nearly every expert: there, the copies of a layer are followed by all of the next layer.

    Args:
        layers: The MoE layers, each with a router.
        start: Called with (layer, experts, distance) for each prediction; a bound method, which is held
            weakly.
        n_experts: Experts to predict for each layer.
        look_ahead: How many layers ahead to predict.
        predictor: Default: `default_predictor`.
        moments: When to predict: "before" a layer's own experts run (earlier), "after" them (more often
            right, see LOG.md; also from the embeddings, before layer 0), or both: then the later prediction
            replaces the earlier one's copies that have not begun.
        passes: The model's; predictions under way are kept in the pass.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: list[MoELayer],
        start: Callable[[int, list[int], int], None],
        n_experts: int,
        look_ahead: int = 1,
        predictor: Predictor | None = None,
        moments: tuple[str, ...] = MOMENTS,
        *,
        passes: Passes,
    ):
        routers = _routers(layers)
        self.n_experts, self.look_ahead, self.moments = n_experts, look_ahead, moments
        self.predictor = predictor or default_predictor(layers)
        self.everything = list(range(len(routers[0].weight)))  # experts of a layer
        # weak, like the hooks' references to this object: a dropped model frees its memory at once
        self._start = weakref.WeakMethod(start)
        targets = [layers[n : n + look_ahead] for n in range(len(layers) + 1)]
        self._targets = [([layer.number for layer in of], of) for of in targets]  # from the n-th on
        self._number = {layer.number: n for n, layer in enumerate(layers)}
        self._passes = passes
        self._hooks: list[RemovableHandle] = []
        weak = weakref.proxy(self)
        if "before" in moments:
            keep = _keep_hidden(weak)
            self._hooks += [router.norm.register_forward_pre_hook(keep) for router in routers]
        if "after" in moments:
            embeddings = model.get_input_embeddings()
            self._hooks.append(embeddings.register_forward_hook(_predict_after(weak, -1)))
            self._on_begin = _predict_from_embeds(weak)
            passes.on_begin.append(self._on_begin)
            for n, layer in enumerate(layers):
                block = layer.block()
                assert block is not None
                self._hooks.append(block.register_forward_hook(_predict_after(weak, n)))

    def number(self, layer: int) -> int:
        """Return a layer's place among the MoE layers."""
        return self._number[layer]

    def is_prompt(self, n_tokens: int) -> bool:
        """Return whether a pass of n_tokens is expected to use nearly all experts."""
        return n_tokens >= len(self.everything)

    @torch.no_grad()
    def rank(self, number: int, hidden: Tensor) -> Tensor | None:
        """Rank the experts of the layers after the MoE layer `number`.

        Args:
            number: -1: before the first one.
            hidden: `[..., H]`. With several tokens, an expert's probability is its share of all tokens'
                routing.

        Returns:
            int64 `[layers, n_experts]`, the most probable first; None if there are no such layers.
        """
        _, targets = self._targets[number + 1]
        if not targets:
            return None
        hidden = hidden.reshape(-1, hidden.shape[-1])
        logits = self.predictor(hidden, targets)
        likely = logits[:, 0] if len(hidden) == 1 else logits.float().softmax(-1).sum(1)  # [targets, experts]
        return likely.topk(min(self.n_experts, likely.shape[-1])).indices

    def before(self, current: Pass, layer: int, n_tokens: int) -> Tensor | list[list[int]] | None:
        """Return the predictions to start with this layer's own copies (see `rank`), or None."""
        hidden, current.hidden = current.hidden, None
        number = self.number(layer)
        if self.is_prompt(n_tokens):
            return [self.everything] if self._targets[number + 1][0] else None
        return None if hidden is None else self.rank(number, hidden)

    def after(self, number: int, hidden: Tensor) -> None:
        """Predict from the output of layer `number`; start copies now, or on CUDA at `start_late`."""
        current = self._passes.current
        if current is None or (self.is_prompt(hidden.shape[:-1].numel()) and number >= 0):
            return
        ranked = self.rank(number, hidden)
        if ranked is not None:
            current.late = number, HostCopy(ranked)
            if not ranked.is_cuda:
                self.start_late(current)

    def keep_hidden(self, hidden: Tensor) -> None:
        """Keep the input of the current layer's norm for `before`."""
        if (current := self._passes.current) is not None:
            current.hidden = hidden

    def start_late(self, current: Pass) -> None:
        """Start the copies of predictions that were on their way to the host."""
        late, current.late = current.late, None
        if late is not None:
            self.start(late[0], late[1].tolist())

    def start(self, number: int, ranked: list[list[int]]) -> None:
        """Start the copies of predictions made at layer `number`, the nearest layer's first."""
        start = self._start()
        assert start is not None
        for distance, (layer, experts) in enumerate(zip(self._targets[number + 1][0], ranked), 1):
            start(layer, experts, distance)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Predict nothing meanwhile."""
        targets = self._targets
        self._targets = [([], []) for _ in targets]
        try:
            yield
        finally:
            self._targets = targets

    def close(self) -> None:
        """Remove the hooks; predict nothing any more."""
        for hook in self._hooks:
            hook.remove()
        if "after" in self.moments:
            self._passes.on_begin.remove(self._on_begin)


def _keep_hidden(prefetcher: Prefetcher) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(norm: nn.Module, arguments: tuple[Any, ...]) -> None:
        prefetcher.keep_hidden(arguments[0])

    return hook


def _predict_from_embeds(prefetcher: Prefetcher) -> Callable[[Pass], None]:
    def on_begin(current: Pass) -> None:
        if current.embeds is not None:  # then no embedding module is called, whose hook would predict
            prefetcher.after(-1, current.embeds)

    return on_begin


def _predict_after(prefetcher: Prefetcher, number: int) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        prefetcher.after(number, output[0] if isinstance(output, tuple) else output)

    return hook
