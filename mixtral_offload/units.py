"""Parse, check and format numbers and sizes."""

from __future__ import annotations

import math
import re

from mixtral_offload.errors import OptionError

UNITS = {
    "": 1,
    "B": 1,
    "KB": 1e3,
    "MB": 1e6,
    "GB": 1e9,
    "TB": 1e12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
#: larger sizes are typing errors: no machine has as much
MOST_BYTES = 1 << 60


def parse_size(text: str | int | float) -> int:
    """Parse a size.

    Args:
        text: A number of bytes, or text such as `15GB`, `512MiB`, or the rate `12GB/s`.

    Returns:
        Bytes; of a rate, bytes per second.
    """
    n_bytes = text if isinstance(text, int | float) else math.nan
    if not isinstance(text, int | float):
        match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([a-zA-Z]*)(?:/s)?\s*", str(text))
        if match and match[2].upper() in UNITS:
            n_bytes = float(match[1]) * UNITS[match[2].upper()]
    if not abs(n_bytes) < MOST_BYTES:  # also for nan
        expected = "a number of bytes, or like 15GB, 512MiB or 12GB/s"
        raise OptionError("cannot read a size", expected=expected, found=str(text)[:100])
    return int(n_bytes)


def check_whole(name: str, value: object, least: int = 1, most: int | None = None) -> None:
    """Raise OptionError unless `value` is a whole number from `least` to `most`."""
    if type(value) is not int or value < least or (most is not None and value > most):
        limit = "" if most is None else f" to {most}"
        raise OptionError(f"impossible {name}", expected=f"a whole number from {least}{limit}", found=value)


def listed(parts: dict[str, int]) -> str:
    """List the parts that are not empty, each with its size."""
    return ", ".join(f"{name} {gb(n_bytes)}" for name, n_bytes in parts.items() if n_bytes)


def gb(n_bytes: float) -> str:
    """Format a number of bytes in GB, MB or kB."""
    if n_bytes >= 1e8:
        return f"{n_bytes / 1e9:.2f} GB"
    return f"{n_bytes / 1e6:.1f} MB" if n_bytes >= 1e6 else f"{n_bytes / 1e3:.0f} kB"
