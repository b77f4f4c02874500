"""Where each stored key of a checkpoint belongs in its model, on the meta device. No files, no values."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import cast

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from mixtral_offload.errors import CheckpointError
from mixtral_offload.models.experts import FUSED
from mixtral_offload.models.family import LAYER, ExpertPlace, Family
from mixtral_offload.weights.hqq import split_quantized

#: one parameter of a module of experts, to find the module's name
PARAMETER = next(iter(reversed(FUSED)))
#: buffers that models compute although old checkpoints hold them
COMPUTED = (r"rotary_emb\.inv_freq", r"(^|\.)position_ids$", r"\.masked_bias$")


@dataclass(frozen=True)
class FusedPlace:
    """One or two matrices of all experts of a module.

    Attributes:
        name: Name of the parameter in the model.
    """

    module: str
    matrices: tuple[str, ...]
    name: str


@dataclass(frozen=True)
class DensePlace:
    """A parameter or buffer of the model.

    Attributes:
        name: Its name in the model; with a field, that of the quantized linear layer.
        field: The part of a quantized linear layer's weight; None for plain tensors.
    """

    name: str
    field: str | None = None

    @property
    def parameter(self) -> str:
        """Name of the parameter or buffer in the model."""
        return self.name if self.field is None else f"{self.name}.weight"


Place = ExpertPlace | FusedPlace | DensePlace


class KeyMap:
    """The places of a model for stored keys.

    An expert is identified by the name of its module in the model and its number there:
    `mtp.layers.0.mlp.experts.3` is not expert 3 of layer 0.

    Args:
        model: On the meta device, with its experts' parameters.
        experts: Names of its modules of experts.
        family: Names of an expert's matrices.
    """

    def __init__(self, model: PreTrainedModel, experts: Iterable[str], family: Family):
        self.model, self.family = model, family
        self.tensors: dict[str, Tensor] = model.state_dict(keep_vars=True)  # tied ones are one object
        self._experts = frozenset(experts)
        transforms = get_model_conversion_mapping(model)
        self._renamings = [of for of in transforms if isinstance(of, WeightRenaming)]
        self._converters = [of for of in transforms if isinstance(of, WeightConverter)]
        unexpected = model._keys_to_ignore_on_load_unexpected or ()
        self._ignored = re.compile("|".join(f"({pattern})" for pattern in (*unexpected, *COMPUTED)))
        self._lists = {match["list"] for name in self._experts if (match := LAYER.match(name))}
        self.module_name = lru_cache(maxsize=None)(self._module_name)

    def place(self, key: str, path: Path | None = None) -> Place | None:
        """Return where the tensor of this key belongs; None if nowhere.

        Args:
            key: As stored.
            path: Its file, for errors.

        Raises:
            CheckpointError: If it belongs somewhere, but in a form that has to be converted first.
        """
        if stored := self.family.expert_place(key):
            module = self.module_name(stored.module)
            if module in self._experts:
                return stored._replace(module=module)
        split = split_quantized(key)
        name, is_converted = self._renamed(f"{split[0]}.weight" if split else key)
        if is_converted:
            raise CheckpointError(
                "a tensor is stored in a form that this package does not read",
                path=path,
                key=key,
                expected="tensors as transformers' modules hold them, or one for each matrix of an expert",
                hint="load it with transformers, save with save_original_format=False, convert that folder",
            )
        if name not in self.tensors:
            return None
        if split:
            return DensePlace(name.removesuffix(".weight"), split[1])
        module, _, parameter = name.rpartition(".")
        return FusedPlace(module, FUSED[parameter], name) if module in self._experts else DensePlace(name)

    def _renamed(self, key: str) -> tuple[str, bool]:
        """The name in the model; whether transformers would convert the tensor on its way there."""
        prefix, known = self.model.base_model_prefix, self.tensors
        name, pattern = rename_source_key(key, self._renamings, self._converters, prefix, known)
        if name not in known and key in known:  # it has its new name already
            return key, False
        if pattern is not None and name not in known:  # so that errors name what has no place by its own name
            return rename_source_key(key, self._renamings, [], prefix, known)[0], False
        return name, pattern is not None

    def _module_name(self, module: str) -> str:
        """The name in the model of a possible module of experts."""
        key = f"{module}.{PARAMETER}"
        prefix = self.model.base_model_prefix
        return rename_source_key(key, self._renamings, [], prefix, self.tensors)[0].removesuffix(
            f".{PARAMETER}"
        )

    def ignores(self, keys: Iterable[str]) -> list[str]:
        """Return the keys without a place that are ignored; the others would change what the model computes.

        Ignored are keys that transformers ignores for this class; buffers that are computed; whatever is
        outside the model's modules (heads of other tasks, `mtp.*`, other models); and whole layers after the
        model's last, for predicting several tokens at once. A plain decoder layer after the last means that
        config.json has too few.
        """
        ignored: list[str] = []
        beyond: dict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
        for key in keys:
            split = split_quantized(key)
            name = self._renamed(f"{split[0]}.weight" if split else key)[0]
            if self._ignored.search(name) or self._is_outside(name):
                ignored.append(key)
            elif (match := LAYER.match(name)) and self._is_beyond(match["list"], match["number"]):
                beyond[match["list"], match["number"]].append((key, name))
        for (of, number), layer in beyond.items():
            if self._predicts_ahead(of, number, [name for _, name in layer]):
                ignored += [key for key, _ in layer]
        return ignored

    def _is_outside(self, name: str) -> bool:
        """Whether the name's first part is nothing in the model, with or without the base model's prefix."""
        first, base = name.partition(".")[0], self.model.base_model
        return first not in self.model._modules and not (
            first in base._modules or first == self.model.base_model_prefix
        )

    def _is_beyond(self, of: str, number: str) -> bool:
        return of in self._lists and int(number[:9]) >= self._n_layers(of)

    def _n_layers(self, of: str) -> int:
        return len(cast(nn.ModuleList, self.model.get_submodule(of)))  # `LAYER` matches lists only

    def _predicts_ahead(self, of: str, number: str, names: list[str]) -> bool:
        """Whether a layer after the model's last is no plain decoder layer.

        The configuration counts it among those that predict further tokens, or it holds what no layer of the
        model holds.
        """
        if int(number[:9]) < self._n_layers(of) + (
            getattr(self.model.config, "num_nextn_predict_layers", None) or 0
        ):
            return True
        usual = {LAYER.sub("", name) for name in self.tensors if name.startswith(f"{of}.")}
        rest = (LAYER.sub("", name) for name in names if not self.family.expert_place(name))
        return any(name not in usual for name in rest)
