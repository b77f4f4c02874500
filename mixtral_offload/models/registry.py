"""The families that have a file of their own, which are those that tests/models/test_families.py runs whole.

To add one: a file beside this one with its `FAMILY`, a line here, and a tiny configuration in that test.
"""

from __future__ import annotations

from typing import Any

from mixtral_offload.models import mixtral, olmoe, qwen_moe
from mixtral_offload.models.family import GENERIC, Family

FAMILIES = {name: of.FAMILY for of in (mixtral, qwen_moe, olmoe) for name in of.FAMILY.model_types}


def family_of(config: Any) -> Family:
    """The family of a configuration, by its `model_type`; `GENERIC` if it has no file of its own."""
    return FAMILIES.get(getattr(config, "model_type", None), GENERIC)
