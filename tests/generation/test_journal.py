"""The journal of a job: a process killed at any moment loses nothing, and repeats nothing."""

import errno
import json
import os
import shutil

import pytest

from mixtral_offload.errors import JobError, OptionError
from mixtral_offload.generation import journal
from mixtral_offload.generation.journal import Journal
from mixtral_offload.system import files
from mixtral_offload.weights.source import DEMO
from tests.job import Engine, names, read, run, write

PROMPTS = [{"prompt": f"What is {n} + {n}?", "id": n} for n in range(7)]


@pytest.fixture
def undisturbed(monkeypatch, tmp_path) -> bytes:
    """The output of a run that nothing happened to; its input stays in tmp_path."""
    write(tmp_path / "in.jsonl", *PROMPTS)
    run(monkeypatch, tmp_path, Engine(), output=tmp_path / "undisturbed.jsonl")
    content = (tmp_path / "undisturbed.jsonl").read_bytes()
    (tmp_path / "undisturbed.jsonl").unlink()
    return content


def interrupt(monkeypatch, folder, after=4) -> bytes:
    """A run that ends early; returns its journal."""
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, folder, Engine(dies_after=after))
    assert names(folder) == ["in.jsonl", "out.jsonl.partial"]
    return (folder / "out.jsonl.partial").read_bytes()


def test_the_output_is_in_the_inputs_order(undisturbed):
    answers = [json.loads(line) for line in undisturbed.splitlines()]
    assert [answer["line"] for answer in answers] == [1, 2, 3, 4, 5, 6, 7]
    assert [answer["id"] for answer in answers] == [0, 1, 2, 3, 4, 5, 6]
    assert all(f"{answer['id']} + {answer['id']}?" in answer["answer"] for answer in answers)


def test_an_interrupted_job_goes_on(monkeypatch, tmp_path, undisturbed):
    for after in range(8):
        if after < 7:
            assert interrupt(monkeypatch, tmp_path, after).count(b"\n") == after + 1
            engine = Engine()
            job = run(monkeypatch, tmp_path, engine)
            assert len(engine.seen) == 7 - after and job.n_kept == after
        else:
            run(monkeypatch, tmp_path, Engine())
        assert (tmp_path / "out.jsonl").read_bytes() == undisturbed
        assert names(tmp_path) == ["in.jsonl", "out.jsonl"]
        (tmp_path / "out.jsonl").unlink()


def test_interrupted_again_and_again(monkeypatch, tmp_path, undisturbed):
    for _ in range(6):
        interrupt(monkeypatch, tmp_path, 1)
    engine = Engine()
    run(monkeypatch, tmp_path, engine)
    assert len(engine.seen) == 1 and (tmp_path / "out.jsonl").read_bytes() == undisturbed


def test_a_journal_cut_at_any_byte(monkeypatch, tmp_path, undisturbed):
    """Killed while writing: every length of the header and of the last line, with and without its newline."""
    kept = interrupt(monkeypatch, tmp_path)
    lines = kept.splitlines(keepends=True)
    cuts = [*range(0, len(lines[0]), 7), len(lines[0]) - 1, *range(len(kept) - len(lines[-1]), len(kept) + 1)]
    assert len(cuts) > 150
    for cut in cuts:
        (tmp_path / "out.jsonl.partial").write_bytes(kept[:cut])
        engine = Engine()
        run(monkeypatch, tmp_path, engine)
        assert len(engine.seen) == (7 if cut < len(lines[0]) else 3 if cut == len(kept) else 4), cut
        assert (tmp_path / "out.jsonl").read_bytes() == undisturbed
        (tmp_path / "out.jsonl").unlink()


def test_what_was_cut_or_forgotten_is_gone_before_anything_is_written(monkeypatch, tmp_path, undisturbed):
    """Or a shorter line would be followed by the rest of a longer one, and a new header by old answers."""
    kept = interrupt(monkeypatch, tmp_path)
    (tmp_path / "out.jsonl.partial").write_bytes(kept + b'{"line": 9, "answer": "' + 500 * b"x")
    for restart, n_rows in ((False, 6), (True, 2)):
        with pytest.raises(KeyboardInterrupt):
            run(monkeypatch, tmp_path, Engine(dies_after=1), restart=restart)
        rows = read(tmp_path / "out.jsonl.partial")
        assert len(rows) == n_rows == len({row.get("line") for row in rows})


def test_a_last_line_that_the_disk_never_got(monkeypatch, tmp_path, undisturbed):
    """After a power cut, a file may have its length without its bytes."""
    kept = interrupt(monkeypatch, tmp_path)
    (tmp_path / "out.jsonl.partial").write_bytes(kept + bytes(40) + b"\n")
    run(monkeypatch, tmp_path, Engine())
    assert (tmp_path / "out.jsonl").read_bytes() == undisturbed


@pytest.mark.parametrize("end", ["output written", "output renamed"])
def test_killed_at_the_very_end(monkeypatch, tmp_path, undisturbed, end):
    interrupt(monkeypatch, tmp_path)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        name = (
            "mixtral_offload.generation.journal.os.replace"
            if end == "output written"
            else "pathlib.Path.unlink"
        )
        patch.setattr(name, lambda *arguments, **options: (_ for _ in ()).throw(KeyboardInterrupt))
        run(patch, tmp_path, Engine())
    assert len(names(tmp_path)) == 3
    engine = Engine()
    run(monkeypatch, tmp_path, engine)
    assert engine.seen == [] and (tmp_path / "out.jsonl").read_bytes() == undisturbed
    assert names(tmp_path) == ["in.jsonl", "out.jsonl"]


@pytest.mark.parametrize("damage", ["garbage", "twice", "an answer to no line", "no line number"])
def test_a_damaged_journal_is_refused_and_left_alone(monkeypatch, tmp_path, undisturbed, damage):
    rows = interrupt(monkeypatch, tmp_path).splitlines(keepends=True)
    rows[2:2] = {
        "garbage": [b"\0\0\0\n"],
        "twice": [rows[3]],
        "no line number": [b'{"line": []}\n'],
        "an answer to no line": [b'{"line": 99, "answer": ""}\n'],
    }[damage]
    (tmp_path / "out.jsonl.partial").write_bytes(b"".join(rows))
    with pytest.raises(JobError, match=r"(?s)journal is damaged.*out.jsonl.partial.*line .*--restart"):
        run(monkeypatch, tmp_path, Engine())
    assert (tmp_path / "out.jsonl.partial").read_bytes() == b"".join(rows)
    run(monkeypatch, tmp_path, Engine(), restart=True)
    assert (tmp_path / "out.jsonl").read_bytes() == undisturbed


@pytest.mark.parametrize(
    "content", [b"my notes", b"my notes\n", b'{"format": "mixtral_offload job 2"}\n', b"{}\n"]
)
def test_a_file_that_is_no_journal_is_left_alone(monkeypatch, tmp_path, undisturbed, content):
    (tmp_path / "out.jsonl.partial").write_bytes(content)
    with pytest.raises(JobError, match=r"(?s)no journal that can be read.*mixtral_offload job 1"):
        run(monkeypatch, tmp_path, Engine())
    assert (tmp_path / "out.jsonl.partial").read_bytes() == content


def test_another_job_is_refused_by_what_differs(monkeypatch, tmp_path, undisturbed):
    kept = interrupt(monkeypatch, tmp_path)
    for options, message in (
        ({"max_tokens": 3}, "max tokens: 512 there, 3 now"),
        ({"temperature": 0.5}, "temperature: 0.0 there, 0.5 now"),
        ({"top_p": 0.5}, "top_p: 0.95 there, 0.5 now"), ({"seed": 3}, "seed: null there, 3 now"),
        ({"raw": True}, "raw: false there, true now"),
        ({"system": "Be brief."}, 'system prompt: null there, "Be brief." now'),
        ({"offload": {"dtype": "bfloat16"}}, 'dtype: "float32" there, "bfloat16" now'),
        ({"offload": {"context_length": 64}}, "context length: 1024 there, 64 now"),
    ):  # fmt: skip
        with pytest.raises(JobError, match=r"(?s)belongs to another job.*--restart") as caught:
            run(monkeypatch, tmp_path, Engine(), **options)
        assert message in str(caught.value)
    write(tmp_path / "in.jsonl", *PROMPTS[1:], PROMPTS[0])
    with pytest.raises(JobError, match="sha256 of the input"):
        run(monkeypatch, tmp_path, Engine())
    assert (tmp_path / "out.jsonl.partial").read_bytes() == kept


def test_a_journal_without_answers_does_not_block_another_job(monkeypatch, tmp_path, undisturbed):
    """Left by a model that could not be loaded, say; the next try may have other options."""
    interrupt(monkeypatch, tmp_path, 0)
    job = run(monkeypatch, tmp_path, Engine(), max_tokens=3)
    assert job.n_kept == 0 and (tmp_path / "out.jsonl").read_bytes() == undisturbed


def test_another_model_is_refused(monkeypatch, tmp_path, undisturbed):
    interrupt(monkeypatch, tmp_path)
    other = tmp_path / "other"
    shutil.copytree(DEMO, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rope_theta": 9.0}))
    monkeypatch.setattr("tests.job.DEMO", other)
    with pytest.raises(JobError, match=r'model: "4bit" there, "other" now; sha256 of config.json: '):
        run(monkeypatch, tmp_path, Engine())


def test_batch_size_and_cache_may_change(monkeypatch, tmp_path, undisturbed):
    interrupt(monkeypatch, tmp_path)
    run(monkeypatch, tmp_path, Engine(), batch_size=2, offload={"cache_size": 2})
    assert (tmp_path / "out.jsonl").read_bytes() == undisturbed


def test_a_complete_output_is_not_replaced_unless_asked(monkeypatch, tmp_path, undisturbed):
    (tmp_path / "out.jsonl").write_text("precious")
    engine = Engine()
    with pytest.raises(JobError, match=r"(?s)there already.*--restart.*another --output"):
        run(monkeypatch, tmp_path, engine)
    assert (tmp_path / "out.jsonl").read_text() == "precious" and engine.seen == []
    assert names(tmp_path) == ["in.jsonl", "out.jsonl"]
    run(monkeypatch, tmp_path, engine, restart=True)
    assert (tmp_path / "out.jsonl").read_bytes() == undisturbed


def test_restart_forgets_but_not_for_a_job_that_cannot_start(monkeypatch, tmp_path, undisturbed):
    kept = interrupt(monkeypatch, tmp_path)
    write(tmp_path / "bad.jsonl", "bad")
    with pytest.raises(JobError, match="cannot be answered"):
        run(monkeypatch, tmp_path, Engine(), input=tmp_path / "bad.jsonl", restart=True)
    assert (tmp_path / "out.jsonl.partial").read_bytes() == kept
    engine = Engine()
    job = run(monkeypatch, tmp_path, engine, restart=True)
    assert len(engine.seen) == 7 and job.n_kept == 0


def test_a_second_process_is_refused(tmp_path):
    first = Journal(tmp_path / "out.jsonl")
    for restart in (False, True):
        with pytest.raises(JobError, match="another process is at work on this output"):
            Journal(tmp_path / "out.jsonl", restart)
    Journal(tmp_path / "other.jsonl").close()
    first.close()
    Journal(tmp_path / "out.jsonl").close()
    assert names(tmp_path) == []


def test_a_journal_that_ends_while_it_is_being_opened(monkeypatch, tmp_path):
    """Its owner finished between open and lock: a lock on a deleted file excludes no other process."""
    flock, removals = files.fcntl.flock, iter([True])

    def late(file, how):
        flock(file, how)
        if next(removals, False):
            (tmp_path / "out.jsonl.partial").unlink()

    monkeypatch.setattr(files.fcntl, "flock", late)
    found = Journal(tmp_path / "out.jsonl")
    with pytest.raises(JobError, match="another process"):
        Journal(tmp_path / "out.jsonl")
    found.close()


@pytest.mark.parametrize("call", range(1, 13))
def test_a_full_disk_is_one_message_and_loses_nothing(monkeypatch, tmp_path, undisturbed, call):
    """fsync fails the n-th time: for the header, the folder, seven answers, the output, the folder."""
    fsync, calls = os.fsync, iter(range(1, 100))

    def full(descriptor):
        if next(calls) == call:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr("mixtral_offload.generation.journal.os.fsync", full)
        if call < 12:
            with pytest.raises(
                JobError, match=rf"(?s){tmp_path}/out.jsonl.*No space left on device.*free some space"
            ):
                run(patch, tmp_path, Engine())
            assert "out.jsonl.partial.ordered" not in names(tmp_path)
        else:  # it is called no twelfth time
            run(patch, tmp_path, Engine())
    if "out.jsonl.partial" in names(tmp_path):
        kept = read(tmp_path / "out.jsonl.partial")
        assert len(kept) == min(max(call - 2, 1), 8)
    if call < 12:
        run(monkeypatch, tmp_path, Engine())
    assert (tmp_path / "out.jsonl").read_bytes() == undisturbed


def test_places_that_cannot_be_written(monkeypatch, tmp_path, undisturbed):
    for output, message in (
        (tmp_path / "nowhere" / "out.jsonl", r"(?s)no such folder.*nowhere"),
        (tmp_path, "the output is not a file"),
        (tmp_path / "in.jsonl", "write over its input"),
    ):
        with pytest.raises((JobError, OptionError), match=message):
            run(monkeypatch, tmp_path, Engine(), output=output)
    for name in ("out.jsonl.partial", "out.jsonl.partial.ordered"):  # the journal would be the input
        write(tmp_path / name, *PROMPTS)
        with pytest.raises(OptionError, match="write over its input"):
            run(monkeypatch, tmp_path, Engine(), input=tmp_path / name, restart=True)
        (tmp_path / name).unlink()
    (tmp_path / "out.jsonl.partial").mkdir()
    with pytest.raises(JobError, match=r"(?s)cannot open the journal.*Is a directory"):
        run(monkeypatch, tmp_path, Engine())


def test_a_system_without_locks_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(journal, "CAN_LOCK", False)
    with pytest.raises(JobError, match="file locks"):
        Journal(tmp_path / "out.jsonl")


def test_an_interrupt_while_the_disk_is_slow_loses_no_line(tmp_path, monkeypatch):
    """And the number of answers that is reported is the number that the next run finds."""
    journal = Journal(tmp_path / "out.jsonl", restart=False)
    journal.begin({"of": "a test"}, [1, 2], {})
    journal.add(1, {"line": 1, "answer": "a"})

    def interrupted(descriptor):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("mixtral_offload.generation.journal.os.fsync", interrupted)
        journal.add(2, {"line": 2, "answer": "b"})
    assert sorted(journal.places) == [1, 2]
    journal.close()
    again = Journal(tmp_path / "out.jsonl", restart=False)
    assert again.places == journal.places
    again.close()
