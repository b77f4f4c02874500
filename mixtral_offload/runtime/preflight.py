"""Whether `from_pretrained` would take a checkpoint, found out from headers alone: no weight is read.

Knows the steps of `from_pretrained`, and carries out those that can refuse a checkpoint, on tensors without memory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mixtral_offload.errors import CheckpointError, OffloadError
from mixtral_offload.models.checkpoint import Checkpoint
from mixtral_offload.runtime.dense import load_trunk
from mixtral_offload.runtime.options import OffloadOptions, device_needs
from mixtral_offload.runtime.prepare import build_skeleton
from mixtral_offload.weights.safetensors_io import StoredTensor


@dataclass(frozen=True)
class Unread(StoredTensor):
    """A stored tensor that gives memory of one element in place of its values."""

    def read(self, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Tensor:
        return torch.zeros((), dtype=dtype or self.dtype, device=device).expand(self.shape)


def unread(stored: StoredTensor) -> Unread:
    return Unread(stored.path, stored.dtype, stored.shape, stored.offset, stored.n_bytes, stored.key)


def check_loads(checkpoint: Checkpoint) -> None:
    """Refuse what `from_pretrained` would refuse, except for want of memory and for what only the weights show.

    Raises:
        OffloadError: as `from_pretrained` raises it.
    """
    emptied = replace(checkpoint, trunk={key: unread(stored) for key, stored in checkpoint.trunk.items()})
    options = OffloadOptions.parse({"device": "cpu"})
    try:
        model = build_skeleton(emptied, options)[0]
        device_needs(emptied, options)
        load_trunk(model, emptied, options.device, options.dtype)
    except OffloadError:
        raise
    except Exception as error:  # transformers and odd configurations raise many kinds
        raise CheckpointError(
            f"a model of {checkpoint.config.model_type} cannot be built from this folder's config.json",
            path=checkpoint.folder / "config.json", found=f"{type(error).__name__}: {error}"[:300],
            hint="check that config.json belongs to these files and is of a family that is supported",
        ) from error  # fmt: skip
