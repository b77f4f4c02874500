"""What stands where transformers' modules have their experts' weights, and says why they are not there.

Knows nothing of models or caches.
"""

from __future__ import annotations

from typing import Any, NoReturn

from torch import nn

from mixtral_offload.errors import OptionError


class AbsentWeight:
    """A weight that an experts module does not hold; whatever uses it raises an OptionError.

    Args:
        name: The parameter's name, as transformers has it.
    """

    def __init__(self, name: str):
        self._name = name

    def _refuse(self) -> NoReturn:
        raise OptionError(
            "this needs the experts' weights as parameters of the model", key=self._name,
            found="offloaded experts, which stay in the checkpoint and in the cache",
            hint='keep experts_implementation="offloaded"; from_pretrained(..., dequantize_on_load=True) makes them parameters where '
            "all of them fit on the device",
        )  # fmt: skip

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # asked for by Python itself, to find out what this is
            raise AttributeError(name)
        self._refuse()

    def __getitem__(self, index: Any) -> NoReturn:
        self._refuse()

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> NoReturn:
        absent = next(
            (value for value in (*args, *(kwargs or {}).values()) if isinstance(value, cls)), cls("weight")
        )
        absent._refuse()


def remove_weights(experts: nn.Module) -> None:
    """Put an `AbsentWeight` in place of each parameter of an experts module."""
    for name in list(experts._parameters):
        del experts._parameters[name]
        setattr(experts, name, AbsentWeight(name))
