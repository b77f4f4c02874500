"""Placeholders for the experts' weights in transformers' modules, which explain why there are none."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import nn

from mixtral_offload.errors import OptionError


class AbsentWeight:
    """A weight that an experts module does not hold; every use raises an OptionError.

    Args:
        name: Name of transformers' parameter.
    """

    def __init__(self, name: str):
        self._name = name

    def _refuse(self) -> NoReturn:
        raise OptionError(
            "this needs the experts' weights as parameters of the model", key=self._name,
            found="offloaded experts, which stay in the checkpoint and in the cache",
            hint='keep experts_implementation="offloaded"; or, if all experts fit on the device, make them '
            "parameters: from_pretrained(..., dequantize_on_load=True)",
        )  # fmt: skip

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # Python itself looks these up
            raise AttributeError(name)
        self._refuse()

    def __getitem__(self, index: Any) -> NoReturn:
        self._refuse()

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> NoReturn:
        values = (*args, *(kwargs or {}).values())
        next((value for value in values if isinstance(value, cls)), cls("weight"))._refuse()


def remove_weights(experts: nn.Module) -> None:
    """Put an `AbsentWeight` in place of each parameter of an experts module."""
    for name in list(experts._parameters):
        del experts._parameters[name]
        setattr(experts, name, AbsentWeight(name))
