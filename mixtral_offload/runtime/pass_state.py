"""The state of one forward pass, and the turns that passes of one model take.

Knows the arguments of a base model's forward. Knows nothing of experts, caches or recorders.
"""

from __future__ import annotations

import functools
import inspect
import math
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mixtral_offload.core.counters import CacheStats
from mixtral_offload.errors import OptionError

if TYPE_CHECKING:
    from mixtral_offload.runtime.prefetch import HostCopy


@dataclass
class Pass:
    """One forward pass of the whole model.

    Attributes:
        number: Counts the model's passes.
        ids: `input_ids [B, T]`; None for a pass that begins with embeddings.
        embeds: `inputs_embeds [B, T, H]`; None for a pass that begins with token ids.
        real: int64 `[n]`, numbers of the tokens (of all sequences after each other) that experts are computed
            for; None: of all. Padding is left out only under `Passes.without_padding`.
        hidden: Input of the current layer's norm, kept for a prediction before that layer's experts.
        late: (index of an MoE layer, predictions on their way to the host).
    """

    number: int
    ids: Tensor | None
    embeds: Tensor | None
    real: Tensor | None
    hidden: Tensor | None = None
    late: tuple[int, HostCopy] | None = None

    @property
    def n_tokens(self) -> int:
        """Tokens of the pass, padding included."""
        return math.prod(_shape(self.ids, self.embeds))

    def real_of(self, n_tokens: int) -> Tensor | None:
        """Return `real` for a layer's input of `n_tokens` tokens; None if they are not this pass's."""
        return self.real if n_tokens == self.n_tokens else None


class Passes:
    """The passes of one model: at most one at a time, each with its own state.

    A pass's state belongs to its thread. Threads take turns, pass by pass; a streamer's callback, which runs
    between passes, never runs under the lock.

    Args:
        counters: Reads counters that passes advance; `counted` is this thread's share.

    Attributes:
        lock: Held during a pass.
        on_begin: Called with each new `Pass`, in its thread, before its first layer.
    """

    def __init__(self, counters: Callable[[], CacheStats] = CacheStats) -> None:
        self._counters = counters
        self.lock = threading.RLock()
        self.on_begin: list[Callable[[Pass], None]] = []
        self._local = threading.local()
        self._n_passes = 0
        self._refusal: tuple[str, str] | None = None
        self._was_forked = False

    @property
    def current(self) -> Pass | None:
        """The pass under way in this thread; None outside of a pass."""
        return getattr(self._local, "current", None)

    @property
    def counted(self) -> CacheStats:
        """Advance of the counters by this thread's passes, including one under way."""
        done, before = getattr(self._local, "counted", None), getattr(self._local, "before", None)
        done = done or CacheStats()
        return done if before is None else done + self._counters() - before

    @torch.compiler.disable(recursive=False)  # torch.compile takes the model's own code, not locks
    def run(self, arguments: Mapping[str, Any], forward: Callable[[], Any]) -> Any:
        """Call `forward` as one pass.

        Args:
            arguments: Arguments of the base model's forward, by name.
            forward: The call itself.

        Raises:
            OptionError: In a process in which this model cannot run.
        """
        if self._was_forked:
            self._was_forked = False
            _use_one_thread()
        with self.lock:
            if self._refusal is not None:
                what, hint = self._refusal
                raise OptionError(what, hint=hint)
            outer = self.current  # a model called from a hook of its own pass
            try:
                if outer is None:
                    self._local.before = self._counters()
                self._n_passes += 1
                can_skip = getattr(self._local, "skips_padding", False)
                self._local.current = _new_pass(self._n_passes, arguments, can_skip)
                for call in tuple(self.on_begin):
                    call(self._local.current)
                return forward()
            finally:
                if outer is None:
                    self._local.counted, self._local.before = self.counted, None
                self._local.current = outer

    @contextmanager
    def without_padding(self) -> Iterator[None]:
        """In this thread's passes meanwhile, experts do not compute padding; their output for it is zero.

        For a caller that uses no results of padding: no logits, no hidden states, no KV cache.
        """
        self._local.skips_padding = True
        try:
            yield
        finally:
            self._local.skips_padding = False

    def after_fork(self, refusal: str | None = None) -> None:
        """In a forked child: replace the lock, which another thread of the parent may have held.

        Args:
            refusal: Why no pass can run there; None if passes can.
        """
        self.lock, self._local = threading.RLock(), threading.local()
        self._was_forked = True
        if refusal is not None:
            self.refuse(refusal, 'start child processes with multiprocessing\'s "spawn" method')

    def refuse(self, what: str, hint: str) -> None:
        """Refuse every pass from now on.

        Args:
            what: What is wrong, in one sentence.
            hint: What to do next.
        """
        self._refusal = what, hint


def _use_one_thread() -> None:
    """Keep torch from waiting for its OpenMP threads, which a fork does not copy."""
    if torch.get_num_threads() > 1:
        torch.set_num_threads(1)
        warnings.warn(
            "this process was forked: torch computes with one thread here, because its other threads were "
            'not copied; processes started with multiprocessing\'s "spawn" method have them all',
            stacklevel=4,
        )


def track_passes(base_model: nn.Module, passes: Passes) -> None:
    """Run every forward pass of `base_model` through `passes`.

    The module's `forward` is wrapped, not hooked: torch skips forward hooks after a KeyboardInterrupt, which
    would leave the lock held. The wrapper refers to the model weakly, so that a dropped model frees its
    memory at once.
    """
    inner, weak = type(base_model).forward, weakref.ref(base_model)
    signature = inspect.signature(base_model.forward)
    names = tuple(signature.parameters)

    @torch.compiler.disable(recursive=False)
    @functools.wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        arguments = dict(zip(names, args)) | kwargs
        return passes.run(arguments, lambda: inner(weak(), *args, **kwargs))

    forward.__signature__ = signature
    base_model.forward = forward


def _new_pass(number: int, arguments: Mapping[str, Any], can_skip: bool) -> Pass:
    ids, embeds = (
        value if isinstance(value := arguments.get(name), Tensor) else None
        for name in ("input_ids", "inputs_embeds")
    )
    if ids is None and embeds is None:  # transformers reports it
        return Pass(number, torch.zeros(0, 0, dtype=torch.long), None, None)
    return Pass(number, ids, embeds, real_tokens(_shape(ids, embeds), arguments) if can_skip else None)


def _shape(ids: Tensor | None, embeds: Tensor | None) -> tuple[int, ...]:
    """(sequences, tokens of each) of a pass."""
    given = embeds if ids is None else ids
    assert given is not None
    return tuple(given.shape[:2])


def real_tokens(shape: tuple[int, ...], arguments: Mapping[str, Any]) -> Tensor | None:
    """Find the tokens of a pass that are not padding.

    A 2-D mask has one column per position from 0 on, as transformers reads it (masking_utils.py): those of
    the KV cache first, then the pass's own, then, if the mask was made for a preallocated cache, later
    positions. Tokens without a column in the mask, and tokens under other kinds of masks, count as real.

    Args:
        shape: (sequences, tokens of each).
        arguments: The pass's arguments, by name.

    Returns:
        int64 `[n]`, numbers of the real tokens, all sequences after each other; None if all are real, or none
        is.
    """
    mask = arguments.get("attention_mask")
    if len(shape) < 2 or 1 in shape:
        return None
    if not isinstance(mask, Tensor) or mask.ndim != 2 or len(mask) != shape[0]:
        return None
    positions = arguments.get("cache_position")
    if not isinstance(positions, Tensor):
        past = arguments.get("past_key_values")
        first = int(past.get_seq_length()) if past is not None else 0
        positions = torch.arange(first, first + shape[1], device=mask.device)
    if len(positions) != shape[1] or positions[-1] >= mask.shape[1]:
        return None
    real = mask[:, positions].reshape(-1).bool()
    return None if real.all() or not real.any() else real.nonzero()[:, 0]
