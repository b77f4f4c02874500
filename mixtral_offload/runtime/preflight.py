"""The checks of `from_pretrained`, carried out on headers alone: no weight is read."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mixtral_offload.errors import CheckpointError, OffloadError
from mixtral_offload.models.checkpoint import Checkpoint
from mixtral_offload.runtime.dense import load_dense
from mixtral_offload.runtime.options import device_needs, parse_options
from mixtral_offload.runtime.prepare import build_skeleton
from mixtral_offload.weights.safetensors_io import StoredTensor


@dataclass(frozen=True)
class Unread(StoredTensor):
    """A stored tensor whose values are not read."""

    def read(self, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Tensor:
        """Return zeros of its shape in the memory of one element."""
        return torch.zeros((), dtype=dtype or self.dtype, device=device).expand(self.shape)


def unread(stored: StoredTensor) -> Unread:
    """Return the same tensor, whose values are not read."""
    return Unread(stored.path, stored.dtype, stored.shape, stored.offset, stored.n_bytes, stored.key)


def check_loads(checkpoint: Checkpoint) -> None:
    """Refuse what `from_pretrained` would refuse, except for lack of memory and for faults of the weights'
    values.

    Raises:
        OffloadError: As `from_pretrained` does.
    """
    emptied = replace(checkpoint, dense={key: unread(stored) for key, stored in checkpoint.dense.items()})
    try:
        with torch.device("cpu"):  # as `from_pretrained` does
            model, _, options = build_skeleton(emptied, parse_options({"device": "cpu"}))
            device_needs(emptied, options)
            load_dense(model, emptied, options.device, options.dtype)
    except OffloadError:
        raise
    except Exception as error:  # transformers and odd configurations raise many kinds
        raise CheckpointError(
            f"a model of {checkpoint.config.model_type} cannot be built from this folder's config.json",
            path=checkpoint.folder / "config.json", found=f"{type(error).__name__}: {error}"[:300],
            hint="check that config.json belongs to these files and is of a family that is supported",
        ) from error  # fmt: skip
