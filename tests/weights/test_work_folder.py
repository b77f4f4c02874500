"""Finished work is never lost: a kill at any line, a name that is taken, a renaming that fails."""

import errno
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mixtral_offload import convert_checkpoint
from mixtral_offload.apps.cli import main
from mixtral_offload.errors import CheckpointError
from mixtral_offload.models.checkpoint import INDEX
from mixtral_offload.runtime import convert
from mixtral_offload.system import files
from mixtral_offload.system.files import write_new
from mixtral_offload.weights import work_folder
from mixtral_offload.weights.checksums import checksum_of
from mixtral_offload.weights.safetensors_io import read_header
from mixtral_offload.weights.source import DEMO
from mixtral_offload.weights.work_folder import (
    JOURNAL,
    WorkFolder,
    finish_renamed,
    resume_hint,
    work_folder_of,
)

NAMES = [f"model-{number}.safetensors" for number in range(3)]
SETTINGS, OTHERS = {"bits": 4}, {"bits": 2}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def tensors(name, settings):
    return {name: torch.full((5,), settings["bits"] + NAMES.index(name))}


def work(target, settings=SETTINGS, n_files=3, fault=False):
    """What a conversion does with its folder; returns the names of the files it has written."""
    written = []
    if finish_renamed(target, settings):
        return written
    with WorkFolder(target, settings) as folder:
        for name in NAMES[:n_files]:
            if name not in folder.finished:
                save_file(tensors(name, settings), folder.path / name)
                written.append(name)
                folder.keep(name, checksum_of(folder.path / name))
        if fault:
            folder.give_up()
            raise CheckpointError("a fault of the source")
        if n_files < len(NAMES):
            raise KeyboardInterrupt
        write_new(folder.path / "config.json", json.dumps(settings))
        folder.finish()
    return written


def killed_at(line: int, call) -> bool:
    """Run `call` in a process that ends before the n-th line that writes; return whether it got there."""
    left, own = iter(range(line)), (work_folder.__file__, files.__file__)

    def trace(frame, event, argument):
        if frame.f_code.co_filename not in own:
            return None
        if event == "line" and next(left, None) is None:
            os._exit(9)
        return trace

    child = os.fork()
    if not child:
        try:
            sys.settrace(trace)
            call()
        except (KeyboardInterrupt, CheckpointError):
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 9)
    return status == 9


def begun(target, settings=SETTINGS):
    with pytest.raises(KeyboardInterrupt):
        work(target, settings, n_files=2)


STARTS = {
    "nothing there": (lambda target: None, {}),
    "two files there": (begun, {}),
    "other settings": (lambda target: begun(target, OTHERS), {}),
    "a fault": (begun, {"fault": True}),
    "an interrupt": (lambda target: None, {"n_files": 1}),
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("start, options", STARTS.values(), ids=STARTS.keys())
def test_a_kill_before_any_line(tmp_path, start, options):
    work(tmp_path / "whole" / "target")
    expected = contents(tmp_path / "whole" / "target")
    for line in range(10_000):
        folder = tmp_path / str(line)
        target = folder / "target"
        folder.mkdir()
        start(target)
        was_killed = killed_at(line, lambda target=target: work(target, **options))
        journal = work_folder_of(target) / JOURNAL
        kept = work_folder._parsed(journal.read_bytes())[1] if journal.exists() else {}
        header = work_folder._parsed(journal.read_bytes())[0] if journal.exists() else None
        if target.exists():
            assert {*expected} <= {*contents(target)} <= {*expected, JOURNAL}  # complete at any moment
        if not target.exists() or (target / JOURNAL).exists():
            again = work(target)
            is_same = header == work_folder._header(SETTINGS)
            assert options.get("fault") or not is_same or not {*again} & {*kept}, line
        assert contents(target) == expected and os.listdir(folder) == ["target"], line
        shutil.rmtree(folder)
        if not was_killed:
            assert line > 30
            return
    raise AssertionError("never came to the end")


def test_a_journal_that_was_cut_anywhere_goes_on(tmp_path):
    work(tmp_path / "whole")
    expected = contents(tmp_path / "whole")
    begun(tmp_path / "target")
    journal = (work_folder_of(tmp_path / "target") / JOURNAL).read_bytes()
    for n_bytes in range(journal.index(b"\n") + 1, len(journal) + 1):
        target = tmp_path / str(n_bytes) / "target"
        shutil.copytree(work_folder_of(tmp_path / "target"), work_folder_of(target))
        (work_folder_of(target) / JOURNAL).write_bytes(journal[:n_bytes])
        begun(target)  # what is cut is written again, and read a second time
        assert resume_hint(target).startswith("2 finished files")
        assert work(target) == NAMES[2:] and contents(target) == expected


def test_a_disk_that_takes_half_a_line(tmp_path):
    """A raw file then says how much it has written, and raises nothing."""
    with pytest.raises(KeyboardInterrupt), WorkFolder(tmp_path / "target", SETTINGS) as folder:
        real = folder._journal

        class Half:
            closed = False
            close = real.close

            def write(self, data):
                return real.write(data[: max(len(data) // 2, 1)])

        folder._journal = Half()
        save_file(tensors(NAMES[0], SETTINGS), folder.path / NAMES[0])
        folder.keep(NAMES[0], checksum_of(folder.path / NAMES[0]))
        raise KeyboardInterrupt
    assert work(tmp_path / "target") == NAMES[1:]


def test_a_file_that_cannot_be_read_now_is_kept(tmp_path, monkeypatch):
    begun(tmp_path / "target")
    before = contents(work_folder_of(tmp_path / "target"))
    for error in (OSError(errno.EMFILE, "Too many open files"), OSError(errno.ESTALE, "Stale file handle")):
        with monkeypatch.context() as patch, pytest.raises(OSError, match=error.strerror):
            patch.setattr(work_folder, "checksum_of", lambda path, error=error: (_ for _ in ()).throw(error))
            work(tmp_path / "target")
        assert contents(work_folder_of(tmp_path / "target")) == before
    bad = OSError(errno.EIO, "Input/output error")
    with monkeypatch.context() as patch:
        patch.setattr(work_folder, "checksum_of", lambda path: (_ for _ in ()).throw(bad))
        begun(tmp_path / "target")  # it is made again
    assert work(tmp_path / "target") == NAMES[2:]


def test_what_cannot_be_removed_keeps_its_journal(tmp_path, monkeypatch):
    begun(tmp_path / "target")

    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="fault of the source"):
        patch.setattr(work_folder, "_delete", refuse)
        work(tmp_path / "target", fault=True)
    assert work(tmp_path / "target") == []


# conversions


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return contents(convert_checkpoint(DEMO, tmp_path_factory.mktemp("whole") / "target"))


def goes_on(target, undisturbed, monkeypatch):
    """The same command ends without making any expert again."""
    said = []
    with monkeypatch.context() as patch:
        patch.setattr(convert, "expert_tensors", lambda *of: pytest.fail("an expert was made again"))
        convert_checkpoint(DEMO, target, report=said.append)
    assert "resuming: 49 files" in said[0]
    assert contents(target) == undisturbed and os.listdir(target.parent) == ["target"]


TAKEN = {
    "file": lambda path: path.write_text("mine"),
    "folder": lambda path: (path.mkdir(), (path / "a").write_text("mine")),
    "empty folder": lambda path: path.mkdir(),
    "link": lambda path: path.symlink_to("nowhere"),
}


@pytest.mark.parametrize("take", TAKEN.values(), ids=TAKEN.keys())
def test_a_name_that_somebody_takes_meanwhile(tmp_path, undisturbed, monkeypatch, take, capsys):
    """All that was done in hours was removed."""
    target, left = tmp_path / "target", iter(range(47))
    monkeypatch.setattr("tqdm.tqdm.update", lambda bar, n: take(target) if next(left, None) is None else None)
    assert main(["convert", str(DEMO), str(target)]) == 1
    error = capsys.readouterr().err
    assert "the checkpoint is finished, but its name is taken" in error
    assert f"it is kept in {work_folder_of(target)}" in error and "move away what has this name" in error
    assert contents(work_folder_of(target)).items() >= undisturbed.items()
    with pytest.raises(CheckpointError, match=r"target exists(?s:.*)49 finished files are kept in"):
        convert_checkpoint(DEMO, target)
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    goes_on(target, undisturbed, monkeypatch)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EXDEV, errno.ENOSPC, errno.EROFS])
def test_a_name_that_cannot_be_given(tmp_path, undisturbed, monkeypatch, number):
    """All that was done in hours was removed."""
    target = tmp_path / "target"

    def refuse(source, target):
        raise OSError(number, os.strerror(number), str(source))

    with monkeypatch.context() as patch:
        patch.setattr(work_folder.os, "rename", refuse)
        with pytest.raises(CheckpointError, match="cannot be given its name") as caught:
            convert_checkpoint(DEMO, target)
    assert str(work_folder_of(target)) in str(caught.value) and os.strerror(number) in str(caught.value)
    assert "the same command then ends" in str(caught.value)
    goes_on(target, undisturbed, monkeypatch)


def test_a_kill_just_after_the_renaming(tmp_path, undisturbed, monkeypatch, capsys):
    target = tmp_path / "target"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(work_folder, "_unlink", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
        convert_checkpoint(DEMO, target)
    assert contents(target).keys() == {*undisturbed, JOURNAL}
    with pytest.raises(CheckpointError, match="target exists"):
        convert_checkpoint(DEMO, target, config_extra={"offload": {"cache_size": 3}})
    assert main(["convert", str(DEMO), str(target)]) == 0
    assert "an earlier run ended after it had written and checked all of it" in capsys.readouterr().err
    assert contents(target) == undisturbed
    with pytest.raises(CheckpointError, match="target exists"):
        convert_checkpoint(DEMO, target)


def test_a_work_folder_that_was_renamed_by_hand_is_not_finished(tmp_path):
    begun(tmp_path / "target")
    work_folder_of(tmp_path / "target").rename(tmp_path / "target")
    assert not finish_renamed(tmp_path / "target", SETTINGS)
    with pytest.raises(CheckpointError, match="target exists"):
        work(tmp_path / "target")


def test_an_error_at_the_end_keeps_the_work_and_says_so(tmp_path, undisturbed, monkeypatch):
    target, said = tmp_path / "target", []
    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="cannot read the file"):
        patch.setattr(
            convert,
            "_check_after",
            lambda *of: (_ for _ in ()).throw(CheckpointError("cannot read the file")),
        )
        convert_checkpoint(DEMO, target, report=said.append)
    assert f"49 finished files are kept in {work_folder_of(target)}" in said[-1]
    goes_on(target, undisturbed, monkeypatch)


def test_damage_of_a_file_that_two_runs_have_read_in_part(tmp_path):
    """The first run reads an expert of a damaged file, the second one the rest: neither reads all of it."""
    source = shutil.copytree(DEMO, tmp_path / "source")
    index = json.loads((source / INDEX).read_text())
    first, second = sorted({*index["weight_map"].values()})[:2]
    save_file(load_file(source / first) | load_file(source / second), source / first)
    (source / second).unlink()
    index["weight_map"] = {
        key: first if name == second else name for key, name in index["weight_map"].items()
    }
    checksums = index["metadata"]["checksums"]["files"]
    checksums.pop(second)
    checksums[first] = checksum_of(source / first)
    (source / INDEX).write_text(json.dumps(index))
    stored = read_header(source / first)["model.layers.0.block_sparse_moe.experts.0.w1.W_q"]
    data = bytearray((source / first).read_bytes())
    data[stored.offset] ^= 1
    (source / first).write_bytes(data)

    def stop(n):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(source, tmp_path / "target", progress=stop)
    with pytest.raises(CheckpointError, match=f"a file is damaged(?s:.*){first}"):
        convert_checkpoint(source, tmp_path / "target")
    assert os.listdir(tmp_path) == ["source"]
