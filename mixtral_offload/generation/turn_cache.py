"""The KV cache that a conversation keeps between turns, and whether the model has changed meanwhile."""

from __future__ import annotations

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from mixtral_offload.models.positions import depend_on_length


class TurnCache:
    """Keeps the KV cache of the last turn.

    Attributes:
        past: The KV cache; None where none is kept.
        ids: The tokens whose keys and values it has.
        state: The model's state when it was kept, see `model_state`.
    """

    def __init__(self) -> None:
        self.state: tuple[object, ...] | None = None
        self.clear()

    def clear(self) -> None:
        """Drop the KV cache."""
        self.past: DynamicCache | None = None
        self.ids: list[int] = []

    def keep(self, model: PreTrainedModel, past: DynamicCache, ids: list[int]) -> None:
        """Keep the KV cache of a turn whose tokens are `ids`; the last one may be missing in it."""
        self.past, self.ids, self.state = past, ids[: past.get_seq_length()], model_state(model)

    def reuse(self, model: PreTrainedModel, ids: list[int]) -> DynamicCache | None:
        """Cut the kept KV cache back to what the prompt `ids` shares with it, and return it.

        Returns:
            An empty KV cache where nothing can be reused; None for a model that makes a kind of its own.
        """
        if not uses_dynamic_cache(model):
            return None
        shared = 0
        limit = min(len(ids) - 1, len(self.ids))  # at least one token must be computed
        while shared < limit and ids[shared] == self.ids[shared]:
            shared += 1
        # the model has changed since the last turn, or its keys depend on the length of the context
        if self.state != model_state(model) or depend_on_length(model):
            shared = 0
        if self.past is None or shared == 0 or not can_be_cut(self.past):
            return DynamicCache(config=model.config)
        if surplus := self.past.get_seq_length() - shared:
            self.past.crop(-surplus)
        return self.past


def uses_dynamic_cache(model: PreTrainedModel) -> bool:
    """Tell whether the model's KV cache is transformers' DynamicCache."""
    # of GenerationMixin, which the type of models lacks
    return bool(model._supports_default_dynamic_cache())  # type: ignore[operator]


def can_be_cut(past: DynamicCache) -> bool:
    """Tell whether every layer keeps all keys and values: no sliding window, no recurrent state."""
    return all(type(layer) is DynamicLayer for layer in past.layers)


def model_state(model: PreTrainedModel) -> tuple[object, ...]:
    """Summarize what differs after a change of the model: its hooks, and torch's change counts of its
    tensors.

    Changes through a tensor's `data` are not counted by torch.
    """
    tensors = (*model.parameters(), *model.buffers())
    # the key of a hook's registration is unique
    hooks = tuple(key for of in model.modules() for key in (*of._forward_hooks, *of._forward_pre_hooks))
    counts = tuple((of.data_ptr(), _changes(of), of.dtype) for of in tensors)
    return id(model), hooks, _optimizer_steps[0], counts


def _changes(tensor: torch.Tensor) -> object:
    """How often it was changed in place; equal to nothing where torch does not count (`inference_mode`)."""
    return object() if tensor.is_inference() else tensor._version


_optimizer_steps = [0]  # of all optimizers: fused ones change tensors without counting


def _count_step(*_: object) -> None:
    _optimizer_steps[0] += 1


register_optimizer_step_post_hook(_count_step)
