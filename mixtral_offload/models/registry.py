"""The families with a file of their own, which tests/models/test_families.py runs completely.

To add one: a file in this folder with its `FAMILY`, a line here, and a tiny configuration in that test.
"""

from __future__ import annotations

from typing import Any

from mixtral_offload.models import mixtral, olmoe, qwen_moe
from mixtral_offload.models.family import GENERIC, Family

FAMILIES: dict[str, Family] = {
    name: of.FAMILY for of in (mixtral, qwen_moe, olmoe) for name in of.FAMILY.model_types
}


def family_of(config: Any) -> Family:
    """Return the family of a configuration, by its `model_type`; `GENERIC` if it has no file of its own."""
    return FAMILIES.get(getattr(config, "model_type", ""), GENERIC)
