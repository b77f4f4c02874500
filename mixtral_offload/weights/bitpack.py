"""Pack small integers into words, in hqq's order. Bits and words only: no scales, no matrices."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

#: bits -> (values packed into one word, dtype of the word); hqq's own packing (hqq/core/bitpack.py), of which
#: we use those of 2 bits and 1 for 3 bits in two parts
WORDS = {
    8: (1, torch.uint8),
    4: (2, torch.uint8),
    3: (10, torch.int32),
    2: (4, torch.uint8),
    1: (8, torch.uint8),
}


def pack(q: Tensor, bits: int) -> Tensor:
    """Pack integers `q [rows, M]` (0 .. 2**bits - 1) along dim 0, the first rows in the highest bits.

    Returns:
        `[ceil(rows / per_word), M]`, uint8 (int32 at 3 bits). Equal to hqq's `BitPack`, but defined for every
        number of rows: the last words are padded with zeros.
    """
    per_word, word = WORDS[bits]
    n_words = math.ceil(q.shape[0] / per_word)
    padded = F.pad(q.to(word), (0, 0, 0, n_words * per_word - q.shape[0]))
    packed = torch.zeros(n_words, q.shape[1], dtype=word, device=q.device)
    for i, part in enumerate(padded.view(per_word, n_words, -1)):
        packed |= part << (bits * (per_word - 1 - i))
    return packed


def unpack(packed: Tensor, bits: int, rows: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    """Invert `pack`: `[n_words, M]` -> `[rows, M]` of `dtype`."""
    per_word, _ = WORDS[bits]
    n_words, mask = packed.shape[0], 2**bits - 1
    q = torch.empty(per_word * n_words, packed.shape[1], dtype=dtype, device=packed.device)
    for i in range(per_word):
        q[i * n_words : (i + 1) * n_words] = (packed >> (bits * (per_word - 1 - i))) & mask
    return q[:rows]
