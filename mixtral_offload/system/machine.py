"""How much memory this process may still take: what the machine has free, or less where a container limits it.

Knows psutil and Linux's control groups, versions 1 and 2. Where there are none (macOS, Windows), the machine counts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import psutil

ROOT = Path("/")


@dataclass(frozen=True)
class _Version:
    """The files of one version of control groups, in bytes; `limits` may hold more than one limit."""

    filesystem: str
    limits: tuple[str, ...]
    usage: str
    inactive: tuple[
        str, ...
    ]  # names in memory.stat of file pages that the system drops first; the first known counts


V1 = _Version(
    "cgroup", ("memory.limit_in_bytes",), "memory.usage_in_bytes", ("total_inactive_file", "inactive_file")
)
V2 = _Version("cgroup2", ("memory.max", "memory.high"), "memory.current", ("inactive_file",))


def free_memory(root: Path = ROOT) -> int:
    """Compute the bytes of RAM that this process can still take.

    Args:
        root: where `proc` and `sys` are; another folder for tests.

    Returns:
        The machine's available memory, or what the tightest control group around this process leaves, if that is less.
        Of a group's usage, file pages that nobody used lately do not count: the system drops them on demand.
    """
    left = (limit - used for limit, used in _groups(root))
    return max(0, min([psutil.virtual_memory().available, *left]))


def total_memory(root: Path = ROOT) -> int:
    """Compute the bytes of RAM that this process could take if it were alone: the machine's, or the tightest limit."""
    return min([psutil.virtual_memory().total, *(limit for limit, _ in _groups(root))])


def _groups(root: Path) -> Iterator[tuple[int, int]]:
    """(limit, bytes in use that cannot be dropped) of each control group around this process that has a limit."""
    for version, top, own in _places(root):
        yield from _group(version, top / own)
        if own.parts:
            for outer in own.parents:  # down to ".", which is `top`
                if version is V2 or _text(top / outer / "memory.use_hierarchy").strip() != "0":
                    yield from _group(version, top / outer)


def _group(version: _Version, folder: Path) -> Iterator[tuple[int, int]]:
    stat = _stat(folder / "memory.stat")
    limits = [_number(folder / name) for name in version.limits]
    limits.append(
        stat.get("hierarchical_memory_limit")
    )  # version 1: also of groups that are not visible from here
    limits = [limit for limit in limits if limit is not None]
    usage = _number(folder / version.usage)
    if limits and usage is not None:
        inactive = next((stat[name] for name in version.inactive if name in stat), 0)
        yield min(limits), max(0, usage - inactive)


def _places(root: Path) -> Iterator[tuple[_Version, Path, PurePosixPath]]:
    """(version, where its groups are mounted, this process's group below), for each hierarchy that may limit memory."""
    mounts = list(_mounts(root))
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if "memory" in controllers.split(","):
            version = V1
        elif (number, controllers) == ("0", ""):
            version = V2
        else:
            continue
        for kind, options, mounted, at in mounts:
            if kind == version.filesystem and (version is V2 or "memory" in options):
                yield version, root / at.lstrip("/"), _below(path, mounted)


def _mounts(root: Path) -> Iterator[tuple[str, list[str], str, str]]:
    """(file system, its options, what of it is mounted, where)."""
    for line in _text(root / "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        fields, rest = before.split(" "), after.split(" ")
        if len(fields) >= 5 and len(rest) >= 3:
            mounted, at = (
                re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), field) for field in fields[3:5]
            )
            yield rest[0], rest[2].split(","), mounted, at


def _below(path: str, mounted: str) -> PurePosixPath:
    """A group's path from what is mounted; that itself where the group is outside, as a container may see it."""
    own = PurePosixPath(path)
    if ".." in own.parts or not own.is_relative_to(mounted):
        return PurePosixPath()
    return own.relative_to(mounted)


def _stat(path: Path) -> dict[str, int]:
    """The numbers of a memory.stat, by name."""
    pairs = (line.split() for line in _text(path).splitlines())
    return {
        pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isascii() and pair[1].isdigit()
    }


def _number(path: Path) -> int | None:
    """None for "max", and where there is no such file."""
    text = _text(path).strip()
    return int(text) if text.isascii() and text.isdigit() else None


def _text(path: Path) -> str:
    """Empty where the file is not there or cannot be read: then it limits nothing that we could know."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
