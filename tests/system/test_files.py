"""Writing into shared folders: modes by the umask, links never followed, only regular files read."""

import os
import re
import stat
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import mixtral_offload
from mixtral_offload import convert_checkpoint
from mixtral_offload.apps.cli import main
from mixtral_offload.core.trace import RoutingTrace
from mixtral_offload.errors import CheckpointError, JobError
from mixtral_offload.system.files import (
    open_locked,
    open_new,
    own_folder,
    read_small,
    replace_file,
    replacing,
    write_new,
)
from mixtral_offload.weights.hqq import PAPER
from mixtral_offload.weights.hub import Record
from mixtral_offload.weights.source import DEMO
from tests.job import Engine, run, write


@contextmanager
def umask(mask):
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def mode(path) -> int:
    return stat.S_IMODE(os.lstat(path).st_mode)


@pytest.fixture(params=[0o022, 0o077, 0o002], ids=oct)
def mask(request):
    with umask(request.param):
        yield request.param


@pytest.fixture
def shared(tmp_path):
    """A world-writable folder, and another user's file outside of it."""
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o777)
    (tmp_path / "precious").write_text("precious")
    return folder


def plant(path: Path) -> Path:
    """Put a link to another user's file where the package will write."""
    path.symlink_to(path.parent.parent / "precious")
    return path


def precious(folder) -> str:
    return (folder.parent / "precious").read_text()


# what each writer of the package leaves


def write_trace(path):
    experts = np.zeros((2, 1, 1), int)
    RoutingTrace.from_routing(experts, n_experts=2).save(path)


def test_convert_into_a_shared_folder(shared, mask):
    target = convert_checkpoint(DEMO.parent / "fp16", shared / "target", PAPER[8])
    assert mode(target) == 0o777 & ~mask, "not the parent's mode"
    assert {mode(path) for path in target.iterdir()} == {0o666 & ~mask}


def test_a_job(shared, mask, monkeypatch):
    write(shared / "in.jsonl", {"prompt": "Hi"})
    plant(shared / "out.jsonl.partial.ordered")
    run(monkeypatch, shared, Engine())
    assert (shared / "out.jsonl").read_text().startswith('{"line": 1') and not (
        shared / "out.jsonl"
    ).is_symlink()
    assert mode(shared / "out.jsonl") == 0o666 & ~mask
    assert precious(shared) == "precious"


@pytest.mark.parametrize("leads", ["somewhere", "nowhere"])
def test_a_journal_that_is_a_link_is_refused(shared, monkeypatch, leads):
    write(shared / "in.jsonl", {"prompt": "Hi"})
    if leads == "nowhere":
        (shared / "out.jsonl.partial").symlink_to(shared.parent / "new")
    else:
        plant(shared / "out.jsonl.partial")
    with pytest.raises(JobError, match="cannot open the journal"):
        run(monkeypatch, shared, Engine())
    assert precious(shared) == "precious" and not (shared.parent / "new").exists()


def test_an_output_that_is_a_link_is_replaced_not_followed(shared, monkeypatch):
    write(shared / "in.jsonl", {"prompt": "Hi"})
    (shared / "out.jsonl").symlink_to(shared.parent / "new")  # leads nowhere yet
    run(monkeypatch, shared, Engine())
    assert not (shared.parent / "new").exists() and (shared / "out.jsonl").read_text()
    (shared / "out.jsonl").unlink()
    plant(shared / "out.jsonl")
    with pytest.raises(JobError, match="there already"):
        run(monkeypatch, shared, Engine())
    run(monkeypatch, shared, Engine(), restart=True)
    assert precious(shared) == "precious"


def test_a_report(shared, mask, tmp_path):
    (tmp_path / "prompts").write_text("What is 2 + 2?\n")
    for name in ("trace.safetensors", "trace.csv", "usage.png", "usage.npy", "routing.png"):
        plant(shared / name)
    command = ["trace", str(tmp_path / "prompts"), str(shared), "--max-tokens", "3", "--device", "cpu"]
    assert main(command) == 0
    assert precious(shared) == "precious"
    written = [path for path in shared.iterdir() if not path.is_symlink()]
    assert {path.suffix for path in written} == {".safetensors", ".csv", ".png", ".npy"}
    assert {mode(path) for path in written} == {0o666 & ~mask}


def test_the_record_of_a_download(shared, mask):
    record = Record("someone/model", "main", shared)
    record.commit = "c"
    record.record.parent.mkdir(parents=True)
    record.record.symlink_to(shared.parent / "precious")
    record.save()
    assert precious(shared) == "precious" and mode(record.record) == 0o666 & ~mask


@pytest.mark.parametrize("leads", ["folder", "nowhere"])
def test_a_work_folder_that_is_a_link(shared, tmp_path, leads):
    (tmp_path / "folder").mkdir()
    (shared / "target.converting").symlink_to(tmp_path / leads)
    with pytest.raises(CheckpointError, match=r"cannot write(?s:.*)not a folder"):
        convert_checkpoint(DEMO, shared / "target")
    assert not list((tmp_path / "folder").iterdir()) and not (tmp_path / "nowhere").exists()


def test_a_target_that_is_a_link_to_nowhere(shared):
    (shared / "target").symlink_to(shared.parent / "new")
    with pytest.raises(CheckpointError, match="target exists"):
        convert_checkpoint(DEMO, shared / "target")
    assert not (shared.parent / "new").exists()


def test_files_are_written_in_no_other_way():
    """All that the package writes goes through files.py."""
    direct = re.compile(
        r"""\bopen\([^)]*["'][wax]|write_text|write_bytes|save_file\(|shutil\.copy|savefig\(|np\.save\(|mkdtemp|NamedTemp|"""
        r"""os\.open\(|\.open\(["'][wax]"""
    )
    allowed = {
        "convert.py": {"save_file(made, part, metadata"},
        "trace_report.py": {"figure.savefig(part,", "np.save(file,", 'part.open("w"', 'part.open("wb")'},
        "cli.py": {"os.open(os.devnull"},
    }
    for path in Path(mixtral_offload.__file__).parent.rglob("*.py"):
        for line in path.read_text().splitlines() if path.name != "files.py" else ():
            if direct.search(line):
                assert any(part in line for part in allowed.get(path.name, ())), f"{path.name}: {line}"


# what is read


@pytest.mark.parametrize("kind", ["device", "pipe", "folder", "link to a device", "too large"])
def test_a_small_file_that_is_none(tmp_path, kind):
    """`*.json` linked to /dev/zero filled the memory."""
    source = tmp_path / "source"
    source.mkdir()
    for path in DEMO.iterdir():
        (source / path.name).symlink_to(path)  # as in the hub's cache
    path = source / "extra.json"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "too large":
        with open(path, "wb") as file:
            file.truncate(1 << 32)
    else:
        path.symlink_to("/dev/zero")
    done = threading.Event()

    def convert():
        with pytest.raises(CheckpointError, match=r"cannot copy a file(?s:.*)extra.json"):
            convert_checkpoint(source, tmp_path / "target")
        done.set()

    thread = threading.Thread(target=convert, daemon=True)
    thread.start()
    assert done.wait(60)
    assert os.listdir(tmp_path) == ["source"]


def test_links_of_the_hubs_cache_are_copied_as_files(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for path in DEMO.iterdir():
        (source / path.name).symlink_to(path)
    target = convert_checkpoint(source, tmp_path / "target")
    assert not any(path.is_symlink() for path in target.iterdir())
    assert (target / "tokenizer.json").read_bytes() == (DEMO / "tokenizer.json").read_bytes()


# the functions


def test_new_files(shared, mask):
    write_new(shared / "a", "text")
    assert (shared / "a").read_bytes() == b"text" and mode(shared / "a") == 0o666 & ~mask
    for path in (shared / "a", plant(shared / "b")):
        with pytest.raises(FileExistsError):
            write_new(path, b"other")
    (shared / "c").symlink_to(shared / "nowhere")
    with pytest.raises(FileExistsError):
        open_new(shared / "c")
    assert (shared / "a").read_text() == "text" and precious(shared) == "precious"


def test_replacing_is_whole_or_not_at_all(shared, mask):
    path = plant(shared / "a")
    replace_file(path, "new", sync=True)
    assert not path.is_symlink() and path.read_text() == "new" and precious(shared) == "precious"
    with pytest.raises(KeyboardInterrupt), replacing(path) as part:
        part.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "new" and os.listdir(shared) == ["a"]
    replace_file(shared / ("n" * 255), b"")  # the longest name there can be


def test_small_files_are_bounded(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 10)
    assert read_small(tmp_path / "a", 10) == b"x" * 10
    with pytest.raises(OSError, match="larger than 9 bytes"):
        read_small(tmp_path / "a", 9)
    with pytest.raises(FileNotFoundError):
        read_small(tmp_path / "b")


def test_locks_and_folders(tmp_path):
    own_folder(tmp_path / "folder")
    own_folder(tmp_path / "folder")
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="not a folder"):
        own_folder(tmp_path / "file")
    with open_locked(tmp_path / "lock"), pytest.raises(BlockingIOError):
        open_locked(tmp_path / "lock")
    open_locked(tmp_path / "lock").close()
    (tmp_path / "link").symlink_to(tmp_path / "file")
    with pytest.raises(OSError):
        open_locked(tmp_path / "link")


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root to give a folder away"
)
def test_a_work_folder_of_another_user(shared):
    """Its finished files might be planted."""
    (shared / "target.converting").mkdir()
    os.chown(shared / "target.converting", 12345, 12345)
    with pytest.raises(CheckpointError, match="belongs to another user"):
        convert_checkpoint(DEMO, shared / "target")
