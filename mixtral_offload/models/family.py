"""A family's names, and where its layers have their experts and routers: `Family`, for most families.

A file per family states how it differs (`registry.py`). Names of transformers' modules, parameters and
settings are in this folder and nowhere else.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from mixtral_offload.errors import OptionError
from mixtral_offload.models.experts import find_experts

#: `model.layers.3.mlp.experts` -> the list of layers, and the layer's number
LAYER = re.compile(r"^(?P<list>.+?)\.(?P<number>\d+)\.")
#: names of an expert's matrices in checkpoints
MATRIX_NAMES = {
    "w1": "gate",
    "gate_proj": "gate",
    "w3": "up",
    "up_proj": "up",
    "w2": "down",
    "down_proj": "down",
}


class ExpertPlace(NamedTuple):
    """One tensor of one expert.

    Attributes:
        module: Name of the module of experts.
        expert: Its number there.
        matrix: "gate", "up" or "down".
        field: "weight", "W_q", ...
        stem: The key without its field.
        short: The key that files of the published format have.
    """

    module: str
    expert: int
    matrix: str
    field: str
    stem: str
    short: str


@dataclass(frozen=True)
class Router:
    """From the residual stream to logits of experts.

    Attributes:
        norm: Applied first.
        module: Has the matrix `weight [E, H]`.
    """

    norm: nn.Module
    module: nn.Module

    def __call__(self, hidden: Tensor) -> Tensor:
        """Compute logits `[T, E]` of hidden states `[T, H]` before the norm."""
        return nn.functional.linear(self.norm(hidden), self.weight)

    @property
    def weight(self) -> Tensor:
        return cast(Tensor, self.module.weight)  # a module's attributes are untyped

    @property
    def epsilon(self) -> float | None:
        """Of an RMS norm; None for any other norm."""
        return getattr(self.norm, "variance_epsilon", None)


@dataclass(frozen=True)
class MoELayer:
    """One MoE layer, found once on the meta model.

    Attributes:
        index: Position among the MoE layers, from 0.
        number: Number in the model's list of layers: the `layer` of an ExpertId.
        name: Name of its module of experts in the model.
        router: None if its choice cannot be predicted.
        block: The decoder layer (a weak reference: it holds the experts, which hold the cache).
    """

    index: int
    number: int
    name: str
    router: Router | None
    block: weakref.ref[nn.Module]

    @property
    def in_list(self) -> str:
        """Name of the model's list of layers; empty if the layer is in none."""
        match = LAYER.match(self.name)
        return match["list"] if match else ""


@dataclass(frozen=True)
class Family:
    """A family's names. The defaults hold for every family without a file of its own.

    Attributes:
        model_types: `model_type` of its configurations.
        expert_counts: Settings with the number of experts in a layer; the first one that exists counts.
        top_ks: The same for experts per token. "top_k" comes last: in old files it may be one of sampling.
        matrices: Stored name of an expert's matrix -> "gate", "up" or "down".
        written: Names that `convert` gives the matrices if the source has all experts in one tensor.
        attention: Ends of the stored keys of the attention's projections, which `convert` can quantize.
        routers: Possible names of the router, in the module that holds the experts' module.
        norm: Name of the norm before the router, in the decoder layer.
    """

    model_types: tuple[str, ...] = ()
    expert_counts: tuple[str, ...] = ("num_local_experts", "num_experts", "n_routed_experts")
    top_ks: tuple[str, ...] = (
        "num_experts_per_tok",
        "num_experts_per_token",
        "moe_topk",
        "moe_k",
        "top_k_experts",
        "top_k",
    )
    matrices: Mapping[str, str] = field(default_factory=lambda: MATRIX_NAMES)
    written: Mapping[str, str] = field(
        default_factory=lambda: {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    )
    attention: tuple[str, ...] = tuple(f".self_attn.{name}_proj.weight" for name in "qkvo")
    routers: tuple[str, ...] = ("gate", "router")
    norm: str = "post_attention_layernorm"

    def n_experts(self, config: Any) -> int | None:
        """Return the experts of a layer, as a configuration states them; None for a dense model."""
        return first_attribute(config, *self.expert_counts)

    def top_k(self, config: Any) -> int | None:
        """Return the experts per token, as a configuration states them."""
        return first_attribute(config, *self.top_ks)

    def tokenizers(self, config: Any) -> tuple[str, ...]:
        """Return hub repositories of the tokenizer, for a checkpoint that comes without one."""
        return ()

    @cached_property
    def _expert_key(self) -> re.Pattern[str]:
        names = "|".join(self.matrices)
        return re.compile(rf"^(?P<module>.+)\.(?P<expert>\d{{1,6}})\.(?P<matrix>{names})\.(?P<field>.+)$")

    def expert_place(self, key: str) -> ExpertPlace | None:
        """Parse the stored key of an expert's tensor (its module by its stored name); None for any other."""
        if not (match := self._expert_key.match(key)):
            return None
        module, expert, matrix, of = match.groups()
        return ExpertPlace(
            module, int(expert), self.matrices[matrix], of, key.removesuffix(of), f"{matrix}.{of}"
        )

    def layers(self, model: nn.Module) -> list[MoELayer]:
        """Find the MoE layers of a model on any device, including meta."""
        found = []
        for index, name in enumerate(find_experts(model)):
            match = LAYER.match(name)
            number = int(match["number"]) if match else index
            router, block = self._router(model, name)
            found.append(MoELayer(index, number, name, router, weakref.ref(block)))
        return found

    def _router(self, model: nn.Module, experts: str) -> tuple[Router | None, nn.Module]:
        """Router and decoder layer of a module of experts."""
        of = experts.rpartition(".")[0]
        parent, block = model.get_submodule(of), model.get_submodule(of.rpartition(".")[0])
        module = next((found for name in self.routers if (found := getattr(parent, name, None))), None)
        norm, weight = getattr(block, self.norm, None), getattr(module, "weight", None)
        if norm is None or module is None or weight is None or weight.ndim != 2:
            return None, block
        return Router(norm, module), block


def check_routers(layers: Sequence[MoELayer]) -> None:
    """Raise an OptionError for a family whose router or norm is not where Mixtral and Qwen-MoE have it."""
    for layer in layers:
        if layer.router is None:
            raise OptionError(
                "experts cannot be predicted: this family's router is not known",
                found=f"{layer.name} without one",
                expected=f"a router `{GENERIC.routers[0]}` and a norm `{GENERIC.norm}`",
                hint="use prefetch=0",
            )


def first_attribute(config: Any, *names: str) -> Any:
    """Return the first of these settings that a configuration has; None if it has none."""
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


GENERIC = Family()
