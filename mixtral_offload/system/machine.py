"""The processor, and the RAM that this process may use: the machine's, or what a control group allows."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import psutil

ROOT = Path("/")


@dataclass(frozen=True)
class _Version:
    """The files of one version of control groups; their values are bytes."""

    filesystem: str
    limits: tuple[str, ...]
    usage: str
    inactive: tuple[str, ...]  # keys of memory.stat, best first: file pages that the system drops on demand


V1 = _Version(
    "cgroup", ("memory.limit_in_bytes",), "memory.usage_in_bytes", ("total_inactive_file", "inactive_file")
)
V2 = _Version("cgroup2", ("memory.max", "memory.high"), "memory.current", ("inactive_file",))


def free_memory(root: Path = ROOT) -> int:
    """Compute the bytes of RAM that this process can still allocate.

    Args:
        root: The folder of `proc` and `sys`; another one in tests.

    Returns:
        The machine's available memory, or what the tightest control group leaves, if that is less. Inactive
        file pages do not count as used: the system drops them on demand.
    """
    left = (limit - used for limit, used in _groups(root))
    return max(0, min([psutil.virtual_memory().available, *left]))


def total_memory(root: Path = ROOT) -> int:
    """Compute the bytes of RAM for this process if it were alone: the machine's, or the tightest limit."""
    return min([psutil.virtual_memory().total, *(limit for limit, _ in _groups(root))])


def _groups(root: Path) -> Iterator[tuple[int, int]]:
    """Yield (limit, bytes in use that cannot be dropped) of each control group that has a limit."""
    for version, top, own in _places(root):
        yield from _group(version, top / own)
        if own.parts:
            for outer in own.parents:  # the last is ".", that is, `top`
                if version is V2 or _text(top / outer / "memory.use_hierarchy").strip() != "0":
                    yield from _group(version, top / outer)


def _group(version: _Version, folder: Path) -> Iterator[tuple[int, int]]:
    stat = _stat(folder / "memory.stat")
    # version 1's hierarchical limit includes groups that are not visible from here
    found = [*(_number(folder / name) for name in version.limits), stat.get("hierarchical_memory_limit")]
    limits = [limit for limit in found if limit is not None]
    usage = _number(folder / version.usage)
    if limits and usage is not None:
        inactive = next((stat[name] for name in version.inactive if name in stat), 0)
        yield min(limits), max(0, usage - inactive)


def _places(root: Path) -> Iterator[tuple[_Version, Path, PurePosixPath]]:
    """Yield (version, mount point, this process's group below it) of each hierarchy that may limit memory."""
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
    """Yield (file system, its options, mounted part of it, mount point)."""
    for line in _text(root / "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        fields, rest = before.split(" "), after.split(" ")
        if len(fields) >= 5 and len(rest) >= 3:
            mounted, at = (_unescaped(field) for field in fields[3:5])
            yield rest[0], rest[2].split(","), mounted, at


def _unescaped(field: str) -> str:
    """Replace the octal escapes of mountinfo, such as `\\040` for a space."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def _below(path: str, mounted: str) -> PurePosixPath:
    """Make a group's path relative to the mounted part; "." where the group is outside, as in containers."""
    own = PurePosixPath(path)
    if ".." in own.parts or not own.is_relative_to(mounted):
        return PurePosixPath()
    return own.relative_to(mounted)


def _stat(path: Path) -> dict[str, int]:
    """Read the whole numbers of a memory.stat, by name."""
    pairs = (line.split() for line in _text(path).splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and _is_number(pair[1])}


def _number(path: Path) -> int | None:
    """Read a file's number; None for "max" and for a missing file."""
    text = _text(path).strip()
    return int(text) if _is_number(text) else None


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()


def _text(path: Path) -> str:
    """Read a file; empty if that fails."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


#: that decide how fast packed products run
INSTRUCTION_SETS = (
    *("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "amx_int8"),
    *("neon", "asimd", "asimddp", "i8mm", "sve"),
)


def processor(info: Path = Path("/proc/cpuinfo")) -> tuple[str, str]:
    """Return the processor's name, and those of its instruction sets that matter here, separated by spaces.

    Args:
        info: What Linux says; elsewhere the name is Python's, and instruction sets are unknown.
    """
    lines = _text(info).splitlines()
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    flags = fields.get("flags", fields.get("Features", "")).split()
    name = fields.get("model name") or platform.processor() or platform.machine()
    return name, " ".join(one for one in INSTRUCTION_SETS if one in flags)
