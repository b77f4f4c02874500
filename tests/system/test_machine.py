"""Free memory under control groups: trees of files as Linux has them, in a folder."""

import collections

import pytest

from mixtral_offload import memory_use
from mixtral_offload.apps.cli import main
from mixtral_offload.apps.notebook import show_versions
from mixtral_offload.runtime.options import budgets, parse_options
from mixtral_offload.system import machine
from mixtral_offload.system.machine import free_memory, processor, total_memory

GB = 10**9
UNLIMITED = 0x7FFFFFFFFFFFF000
TOP2 = "30 23 0:26 {mounted} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"
TOP1 = "33 24 0:29 {mounted} /sys/fs/cgroup/memory rw,nosuid shared:9 - cgroup cgroup rw,memory"
CPU1 = "34 24 0:30 / /sys/fs/cgroup/cpu rw shared:10 - cgroup cgroup rw,cpu,cpuacct"


@pytest.fixture(autouse=True)
def sixteen_gb(monkeypatch):
    kind = collections.namedtuple("memory", "total available")
    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: kind(16 * GB, 10 * GB))


def tree(root, mounts, groups, files):
    """A root folder with these lines in /proc/self, and these files below /sys/fs/cgroup."""
    written = {"proc/self/mountinfo": "\n".join(mounts), "proc/self/cgroup": "\n".join(groups)}
    written |= {f"sys/fs/cgroup/{name}": str(content) for name, content in files.items()}
    for name, content in written.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return root


def v2(group, limit, used, inactive=0, high="max"):
    prefix = f"{group}/" if group else ""
    stat = f"anon {used - inactive}\nfile {inactive}\ninactive_file {inactive}\nslab_reclaimable 1"
    return {
        f"{prefix}memory.max": limit,
        f"{prefix}memory.high": high,
        f"{prefix}memory.current": used,
        f"{prefix}memory.stat": stat,
    }


def v1(group, limit, used, inactive=0, hierarchical=UNLIMITED, use_hierarchy=1):
    prefix = f"memory/{group}/" if group else "memory/"
    stat = f"inactive_file 1\nhierarchical_memory_limit {hierarchical}\ntotal_inactive_file {inactive}"
    return {
        f"{prefix}memory.limit_in_bytes": limit,
        f"{prefix}memory.usage_in_bytes": used,
        f"{prefix}memory.stat": stat,
        f"{prefix}memory.use_hierarchy": use_hierarchy,
    }


IN_2 = [TOP2.format(mounted="/")], ["0::/"]
DEEP_2 = [TOP2.format(mounted="/")], ["0::/user.slice/app.scope"]
IN_1 = [TOP1.format(mounted="/"), CPU1], ["12:cpu,cpuacct:/", "4:memory:/", "1:name=systemd:/", "0::/"]
DEEP_1 = [TOP1.format(mounted="/")], ["4:memory:/docker/abc"]
CASES = {
    # what: (mounts and groups, files, free, total)
    "no control groups": (([], []), {}, 10 * GB, 16 * GB),
    "v2, a container": (IN_2, v2("", 4 * GB, 1 * GB), 3 * GB, 4 * GB),
    "v2, inactive file pages are free": (IN_2, v2("", 4 * GB, 3 * GB, 2 * GB), 3 * GB, 4 * GB),
    "v2, no limit": (IN_2, v2("", "max", 1 * GB), 10 * GB, 16 * GB),
    "v2, more than the machine has": (IN_2, v2("", 64 * GB, 1 * GB), 10 * GB, 16 * GB),
    "v2, memory.high": (IN_2, v2("", 8 * GB, 1 * GB, high=3 * GB), 2 * GB, 3 * GB),
    "v2, used up": (IN_2, v2("", 4 * GB, 5 * GB), 0, 4 * GB),
    "v2, the root group, which has no files": (IN_2, {}, 10 * GB, 16 * GB),
    "v2, nested, the inner one is tightest": (
        DEEP_2, {**v2("user.slice", 9 * GB, 1 * GB), **v2("user.slice/app.scope", 4 * GB, 1 * GB)},
        3 * GB, 4 * GB),
    "v2, nested, the outer one is tightest": (
        DEEP_2, {**v2("user.slice", 6 * GB, 5 * GB, 1 * GB), **v2("user.slice/app.scope", 4 * GB, GB // 2)},
        2 * GB, 4 * GB),
    "v2, nested, a limit only outside": (
        DEEP_2, {**v2("user.slice", 6 * GB, 1 * GB), **v2("user.slice/app.scope", "max", 1 * GB)},
        5 * GB, 6 * GB),
    "v2, memory is not delegated to the inner group": (
        DEEP_2, v2("user.slice", 6 * GB, 1 * GB), 5 * GB, 6 * GB),
    "v2, another group": (DEEP_2, v2("user.slice/other.scope", 1 * GB, 1 * GB), 10 * GB, 16 * GB),
    "v2, the host's path seen from inside": (
        ([TOP2.format(mounted="/docker/abc")], ["0::/docker/abc"]), v2("", 4 * GB, 1 * GB), 3 * GB, 4 * GB),
    "v2, a path outside of what is mounted": (
        ([TOP2.format(mounted="/../..")], ["0::/../../x"]), v2("", 4 * GB, 1 * GB), 3 * GB, 4 * GB),
    "v2, a folder with a space": (
        ([r"30 23 0:26 / /sys/fs/cgroup\040x rw - cgroup2 cgroup2 rw"], ["0::/"]),
        {f"../cgroup x/{name}": value for name, value in v2("", 4 * GB, 1 * GB).items()}, 3 * GB, 4 * GB),
    "v1, a container": (IN_1, v1("", 4 * GB, 3 * GB, 2 * GB), 3 * GB, 4 * GB),
    "v1, no limit": (IN_1, v1("", UNLIMITED, 3 * GB), 10 * GB, 16 * GB),
    "v1, nested": (
        DEEP_1, {**v1("docker", 5 * GB, 4 * GB), **v1("docker/abc", 8 * GB, 1 * GB)},
        1 * GB, 5 * GB),
    "v1, the outer one does not count its children": (
        DEEP_1, {**v1("docker", 5 * GB, 4 * GB, use_hierarchy=0), **v1("docker/abc", 8 * GB, 1 * GB)},
        7 * GB, 8 * GB),
    "v1, a limit of a group that is not visible": (
        ([TOP1.format(mounted="/docker/abc")], ["4:memory:/docker/abc"]),
        v1("", UNLIMITED, 1 * GB, hierarchical=3 * GB), 2 * GB, 3 * GB),
    "v1, the host's path seen from inside": (
        ([TOP1.format(mounted="/docker/abc")], ["4:memory:/docker/abc"]), v1("", 4 * GB, 1 * GB),
        3 * GB, 4 * GB),
    "hybrid: memory is in version 1": (
        ([TOP1.format(mounted="/"), "35 24 0:31 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw"],
         ["4:memory:/a", "0::/a"]),
        {**v1("a", 4 * GB, 1 * GB), "unified/a/cgroup.procs": 1}, 3 * GB, 4 * GB),
    "hybrid: memory is in version 2": (
        ([CPU1, "35 24 0:31 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw"],
         ["3:cpu,cpuacct:/a", "0::/a"]),
        {f"unified/{name}": value for name, value in v2("a", 4 * GB, 1 * GB).items()}, 3 * GB, 4 * GB),
    "garbage": (
        (["x", " - ", "a b c d e - cgroup2 x y", TOP2.format(mounted="/")], ["", "::", "0::", "x", "0::/"]),
        {**v2("", "12x", 1 * GB), "memory.stat": "inactive_file\n\n-1 2 3\ninactive_file ²"},
        10 * GB, 16 * GB),
    "no usage": (IN_2, {"memory.max": 4 * GB}, 10 * GB, 16 * GB),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_free_memory(tmp_path, case):
    (mounts, groups), files, free, total = CASES[case]
    root = tree(tmp_path, mounts, groups, files)
    assert (free_memory(root), total_memory(root)) == (free, total)


def test_where_there_is_no_proc_the_machine_counts(tmp_path):
    """macOS, Windows."""
    assert (free_memory(tmp_path), total_memory(tmp_path)) == (10 * GB, 16 * GB)


def test_every_plan_respects_the_container(tmp_path, monkeypatch, capsys):
    root = tree(tmp_path, *IN_2, v2("", 50_000_000, 20_000_000, 10_000_000))
    monkeypatch.setattr(machine.free_memory, "__defaults__", (root,))
    monkeypatch.setattr(machine.total_memory, "__defaults__", (root,))
    assert budgets(parse_options({"device": "cpu"})) == (36_000_000, 36_000_000)
    use = memory_use(device="cpu")
    assert use.device_budget == use.ram_budget == 36_000_000
    assert use.device_bytes + use.ram_bytes <= 36_000_000
    assert main(["info", "--device", "cpu"]) == 0
    assert "fits here" in capsys.readouterr().out
    tree(tmp_path, *IN_2, v2("", 50_000_000, 49_000_000))
    assert main(["info", "--device", "cpu"]) == 0
    assert "does not fit here" in capsys.readouterr().out
    show_versions()
    assert "1.0 MB of 50.0 MB RAM free" in capsys.readouterr().out


def test_the_processor_as_linux_describes_it(tmp_path):
    info = tmp_path / "cpuinfo"
    info.write_text("processor : 0\nmodel name\t: Some CPU\nflags\t\t: fpu avx2 fma avx512fp16 avx2x\n")
    assert processor(info) == ("Some CPU", "avx2 fma")
    info.write_text("processor : 0\nFeatures : fp asimd sve\n")  # ARM names no model
    assert processor(info)[0] and processor(info)[1] == "asimd sve"
    assert processor(tmp_path / "none")[0] and processor(tmp_path / "none")[1] == ""
