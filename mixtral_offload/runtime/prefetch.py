"""Speculative loading: guess the experts of layers to come from the hidden state of now (2312.17238, section 3.2).

Knows the routers of a model's layers. Knows nothing of slots or copies: a guess is a ranking of experts.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mixtral_offload.models.family import MoELayer
from mixtral_offload.runtime.pass_state import Pass, Passes

#: when to guess, as `Prefetcher` takes it
MOMENTS = ("after",)
#: (hidden state `[T, H]` of now, layers to guess for) -> logits `[layers, T, experts]`
Predictor = Callable[[Tensor, Sequence[MoELayer]], Tensor]


def next_router(hidden: Tensor, layers: Sequence[MoELayer]) -> Tensor:
    """What the later layers' routers would say if their layers began here: their own norm, then their own weights."""
    return torch.stack([layer.router(hidden) for layer in layers])


class FoldedRouters:
    """`next_router` for RMS norms in few operations, however many layers: each norm's weight is folded into its
    router's, and what is left of the norm is the same for all. For a single token it is left out: one factor for all
    logits, it does not change their order."""

    def __init__(self):
        #: by the first layer to guess for, which says which others follow
        self._folded: dict[int, Tensor] = {}

    def __call__(self, hidden: Tensor, layers: Sequence[MoELayer]) -> Tensor:
        first, routers = layers[0].number, [layer.router for layer in layers]
        folded = self._folded.get(first)
        if folded is None or len(folded) != len(layers) * len(routers[0].weight):
            weights = [router.weight.float() * router.norm.weight.float() for router in routers]
            folded = self._folded[first] = torch.cat(weights)  # [layers * experts, H]
        x = hidden.float()
        if len(x) > 1:
            x = nn.functional.rms_norm(x, x.shape[-1:], eps=routers[0].epsilon)
        return nn.functional.linear(x, folded).view(len(x), len(layers), -1).transpose(0, 1)


def default_predictor(layers: Sequence[MoELayer]) -> Predictor:
    """Folded routers where every norm is an RMS norm."""
    return FoldedRouters() if all(layer.router.epsilon is not None for layer in layers) else next_router


class HostCopy:
    """Numbers of a tensor on their way to the host, which goes on meanwhile; on the CPU they are there."""

    def __init__(self, tensor: Tensor):
        self._tensor, self._event = tensor, None
        if tensor.is_cuda:
            self._tensor = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._tensor.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.current_stream(tensor.device).record_event()

    def tolist(self) -> list:
        """Waits until they have arrived."""
        if self._event is not None:
            self._event.synchronize()
        return self._tensor.tolist()


class Prefetcher:
    """Guesses the experts of the layers that come next, up to `look_ahead` layers ahead.

    n_experts: how many experts of each such layer to ask for. moments: when to guess: "before" a layer's own experts
    run (earlier), "after" them (more often right, see LOG.md; the embedding is what comes before layer 0), or both,
    the later guess then correcting the earlier one where its copy has not begun. A prompt needs (nearly) every expert:
    there, all of the next layer's are asked for as soon as a layer has asked for its own.
    start: called with (layer, experts, distance) for each guess. passes: the model's; what a pass has found so far is
    kept there. Outside of a pass, nothing is guessed.
    """

    def __init__(
        self, model: nn.Module, layers: list[MoELayer], start: Callable[[int, list[int], int], None], n_experts: int, look_ahead: int = 1,
        predictor: Predictor | None = None, moments: tuple[str, ...] = MOMENTS, *, passes: Passes,
    ):  # fmt: skip
        self.n_experts, self.look_ahead, self.moments = n_experts, look_ahead, moments
        self.predictor = predictor or default_predictor(layers)
        self.everything = list(range(len(layers[0].router.weight)))  # experts of a layer
        # weak, like the hooks' hold on this object: a dropped model frees its memory at once, without a collection
        self._start = weakref.WeakMethod(start)
        targets = [layers[n : n + look_ahead] for n in range(len(layers) + 1)]
        self._targets = [([layer.number for layer in of], of) for of in targets]  # from the n-th on
        self._number = {layer.number: n for n, layer in enumerate(layers)}
        self._hooks, self._passes = [], passes
        weak = weakref.proxy(self)
        if "before" in moments:
            norms = [layer.router.norm for layer in layers]
            self._hooks += [norm.register_forward_pre_hook(_keep_hidden(weak)) for norm in norms]
        if "after" in moments:
            embeddings = model.get_input_embeddings()
            self._hooks.append(embeddings.register_forward_hook(_guess_after(weak, -1)))
            self._on_begin = _guess_from_embeds(weak)
            passes.on_begin.append(self._on_begin)
            self._hooks += [
                layer.block().register_forward_hook(_guess_after(weak, n)) for n, layer in enumerate(layers)
            ]

    def number(self, layer: int) -> int:
        """A layer's place among those with experts."""
        return self._number[layer]

    def is_prompt(self, n_tokens: int) -> bool:
        """Whether so many tokens will need about every expert."""
        return n_tokens >= len(self.everything)

    @torch.no_grad()
    def rank(self, number: int, hidden: Tensor) -> Tensor | None:
        """For each layer to guess for, its likeliest experts `[layers, n_experts]`, the likeliest first; None if there is
        no such layer. With several tokens at hand, an expert's likelihood is its share of all tokens' routing."""
        _, targets = self._targets[number + 1]
        if not targets:
            return None
        hidden = hidden.reshape(-1, hidden.shape[-1])
        logits = self.predictor(hidden, targets)
        likely = logits[:, 0] if len(hidden) == 1 else logits.float().softmax(-1).sum(1)  # [targets, experts]
        return likely.topk(min(self.n_experts, likely.shape[-1])).indices

    def before(self, current: Pass, layer: int, n_tokens: int) -> Tensor | list[list[int]] | None:
        """The guesses to start with this layer's own copies (see `rank`); None if this is not a moment for them."""
        hidden, current.hidden = current.hidden, None
        number = self.number(layer)
        if self.is_prompt(n_tokens):
            return [self.everything] if self._targets[number + 1][0] else None
        return None if hidden is None else self.rank(number, hidden)

    def after(self, number: int, hidden: Tensor) -> None:
        """Guess from what layer `number` has given, and start as soon as the host knows: now, or at `start_late`."""
        current = self._passes.current
        if current is None or (self.is_prompt(hidden.shape[:-1].numel()) and number >= 0):
            return
        ranked = self.rank(number, hidden)
        if ranked is not None:
            current.late = number, HostCopy(ranked)
            if not ranked.is_cuda:
                self.start_late(current)

    def keep_hidden(self, hidden: Tensor) -> None:
        """Keep what the newest layer's norm was given, for `before`."""
        if (current := self._passes.current) is not None:
            current.hidden = hidden

    def start_late(self, current: Pass) -> None:
        """Start the guesses that were on their way to the host."""
        late, current.late = current.late, None
        if late is not None:
            self.start(late[0], late[1].tolist())

    def start(self, number: int, ranked: list[list[int]]) -> None:
        """Start the copies of guesses made at layer `number`, the nearest layer's first."""
        for distance, (layer, experts) in enumerate(zip(self._targets[number + 1][0], ranked), 1):
            self._start()(layer, experts, distance)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Predict nothing meanwhile."""
        targets, self._targets = self._targets, [([], [])] * len(self._targets)
        try:
            yield
        finally:
            self._targets = targets

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        if "after" in self.moments:
            self._passes.on_begin.remove(self._on_begin)


def _keep_hidden(prefetcher: Prefetcher):
    def hook(norm: nn.Module, arguments: tuple) -> None:
        prefetcher.keep_hidden(arguments[0])

    return hook


def _guess_from_embeds(prefetcher: Prefetcher):
    def on_begin(current: Pass) -> None:
        if current.embeds is not None:  # no embedding module is called, whose hook would guess
            prefetcher.after(-1, current.embeds)

    return on_begin


def _guess_after(prefetcher: Prefetcher, number: int):
    def hook(module: nn.Module, inputs: tuple, output) -> None:
        prefetcher.after(number, output[0] if isinstance(output, tuple) else output)

    return hook
