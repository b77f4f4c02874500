"""What a family of models calls things, and where its layers have their experts and routers.

`Family` describes what most families of transformers share. The rest follows from transformers' own renamings
(`keys.py`) and from the model on the meta device. A file per family states how it differs (`registry.py`).
Names of transformers' modules, parameters and settings are in this folder and nowhere else.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from torch import Tensor, nn

from mixtral_offload.errors import OptionError
from mixtral_offload.models.experts import find_experts

#: `model.layers.3.mlp.experts` -> the list of layers, and the layer's number
LAYER = re.compile(r"^(?P<list>.+?)\.(?P<number>\d+)\.")
#: what checkpoints call the matrices of an expert
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
    """From the residual stream to logits of experts: a norm, then the matrix `weight [E, H]` of a module."""

    norm: nn.Module
    module: nn.Module

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits `[T, E]` of hidden states `[T, H]` before the norm."""
        return nn.functional.linear(self.norm(hidden), self.weight)

    @property
    def weight(self) -> Tensor:
        return self.module.weight

    @property
    def epsilon(self) -> float | None:
        """Of an RMS norm; None for any other norm."""
        return getattr(self.norm, "variance_epsilon", None)


@dataclass(frozen=True)
class MoELayer:
    """One layer with experts, found once on the meta model.

    Attributes:
        index: Its place among the layers with experts, from 0.
        number: Its number in the model's list of layers: the `layer` of an ExpertId.
        name: Of its module of experts in the model.
        router: None where its choice cannot be predicted.
        block: The decoder layer (held weakly: it holds the experts, which hold the cache).
    """

    index: int
    number: int
    name: str
    router: Router | None
    block: weakref.ref[nn.Module]

    @property
    def in_list(self) -> str:
        """Name of the model's list of layers; empty where the layer is in none."""
        match = LAYER.match(self.name)
        return match["list"] if match else ""


@dataclass(frozen=True)
class Family:
    """What a family calls things. The defaults hold for every family without a file of its own.

    Attributes:
        model_types: Of its configurations.
        expert_counts: Settings with the number of experts in a layer; the first one that is there counts.
        top_ks: The same for experts per token. "top_k" comes last: in old files it may be one of sampling.
        matrices: Stored name of a matrix of an expert -> "gate", "up" or "down".
        written: What `convert` calls the matrices where the source has all experts in one tensor.
        attention: Ends of the stored keys of the attention's projections, which `convert` can quantize.
        routers: Names that the router may have, beside the experts.
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
        """Experts of a layer, as a configuration says it; None of a dense model."""
        return first_attribute(config, *self.expert_counts)

    def top_k(self, config: Any) -> int | None:
        """Experts that each token uses, as a configuration says it."""
        return first_attribute(config, *self.top_ks)

    def tokenizers(self, config: Any) -> tuple[str, ...]:
        """Hub repositories of the tokenizer, for a checkpoint that comes without one."""
        return ()

    @cached_property
    def _expert_key(self) -> re.Pattern[str]:
        names = "|".join(self.matrices)
        return re.compile(rf"^(?P<module>.+)\.(?P<expert>\d{{1,6}})\.(?P<matrix>{names})\.(?P<field>.+)$")

    def expert_place(self, key: str) -> ExpertPlace | None:
        """What a stored key says about an expert, its module by its stored name; None of any other tensor."""
        if not (match := self._expert_key.match(key)):
            return None
        module, expert, matrix, of = match.groups()
        return ExpertPlace(
            module, int(expert), self.matrices[matrix], of, key.removesuffix(of), f"{matrix}.{of}"
        )

    def layers(self, model: nn.Module) -> list[MoELayer]:
        """Find the layers with experts of a model on any device, the meta device too."""
        found = []
        for index, name in enumerate(find_experts(model)):
            match = LAYER.match(name)
            number = int(match["number"]) if match else index
            router, block = self._router(model, name)
            found.append(MoELayer(index, number, name, router, weakref.ref(block)))
        return found

    def _router(self, model: nn.Module, experts: str) -> tuple[Router | None, nn.Module]:
        """(router, decoder layer) of a module of experts."""
        of = experts.rpartition(".")[0]
        beside, block = model.get_submodule(of), model.get_submodule(of.rpartition(".")[0])
        module = next((found for name in self.routers if (found := getattr(beside, name, None))), None)
        norm, weight = getattr(block, self.norm, None), getattr(module, "weight", None)
        known = norm is not None and weight is not None and weight.ndim == 2
        return Router(norm, module) if known else None, block


def check_routers(layers: Sequence[MoELayer]) -> None:
    """Raise an OptionError for a family whose router or norm is not where Mixtral and Qwen-MoE have it."""
    for layer in layers:
        if layer.router is None:
            raise OptionError(
                "speculative loading does not know this family's router",
                found=f"{layer.name} without one",
                expected=f"a router `{GENERIC.routers[0]}` and a norm `{GENERIC.norm}`",
                hint="use prefetch=0",
            )


def first_attribute(config: Any, *names: str) -> Any:
    """The first of these settings that a configuration has; None if it has none."""
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


GENERIC = Family()
