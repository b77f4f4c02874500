"""Jobs as a user runs them: the shipped model, processes, SIGKILL, Ctrl-C. Files alone: test_journal.py."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import warnings

import pytest

from mixtral_offload import ChatSession
from mixtral_offload.apps.cli import main
from mixtral_offload.errors import JobError, OptionError
from mixtral_offload.generation.jobs import JobOptions
from mixtral_offload.generation.tokenizer import load_tokenizer
from mixtral_offload.weights.source import DEMO
from tests.job import Engine, names, read, run, write

COMMAND = [sys.executable, "-m", "mixtral_offload", "generate", "--device", "cpu", "--cache-size", "4"]
QUESTIONS = [
    "What is the capital of France?",
    "What is 47 + 38?",
    "Tell me a story about a fox.",
    "What is 47 + 38?",
    "How do I sort a list in Python?",
]
HEROES = ["fox", "bird", "boy named Tom", "mirror", "king", "cat", "girl named Ana", "tree", "river", "dog"]
STORIES = [{"prompt": f"Tell me a story about a {hero}.", "id": hero} for hero in HEROES]


def test_answers_are_those_of_a_chat(monkeypatch, tmp_path, offloaded):
    """The same prompt says the same, here and in `generate`; also the second time."""
    model = offloaded(DEMO, cache_size=4, batch_size=32)
    write(tmp_path / "in.jsonl", *({"prompt": text} for text in QUESTIONS))
    for settings in ({}, {"system": "You are a pirate."}, {"max_tokens": 7}):
        job = run(monkeypatch, tmp_path, model=model, restart=True, **settings)
        answers = read(tmp_path / "out.jsonl")
        for text, answer in zip(QUESTIONS, answers, strict=True):
            chat = ChatSession(
                model,
                load_tokenizer(DEMO),
                system_prompt=settings.get("system"),
                max_new_tokens=settings.get("max_tokens", 512),
            )
            assert "".join(chat.send(text)) == answer["answer"] and chat.ended == answer["ended"]
            assert (chat.last.n_prompt, chat.last.n_tokens) == (answer["n_prompt"], answer["n_tokens"])
        n_tokens = sum(answer["n_tokens"] for answer in answers)
        summary = (
            rf"5 answers: {n_tokens} tokens, [\d.]+ tokens/s, "
            r"\d+% of expert uses were hits, [\d.]+ MB moved per token"
        )
        assert re.fullmatch(summary, job.summary), job.summary


def test_a_conversation_is_answered_as_in_a_chat(monkeypatch, tmp_path, offloaded):
    model = offloaded(DEMO, cache_size=4, batch_size=32)
    chat = ChatSession(model, load_tokenizer(DEMO))
    for text in ("My name is Priya.", "What is my name?"):
        last = "".join(chat.send(text))
    write(tmp_path / "in.jsonl", {"messages": chat.messages[:-1]})
    run(monkeypatch, tmp_path, model=model)
    assert read(tmp_path / "out.jsonl")[0]["answer"].strip() == last.strip() and "Priya" in last


def test_lines_have_lengths_of_their_own(monkeypatch, tmp_path, offloaded):
    model = offloaded(DEMO, cache_size=4, batch_size=32, context_length=64)
    story = {"prompt": "Tell me a story about a fox."}
    write(tmp_path / "in.jsonl", {**story, "max_tokens": 3}, story, {"prompt": "What is 2 + 2?"})
    run(monkeypatch, tmp_path, model=model, max_tokens=60, offload={"context_length": 64})
    short, long, complete = read(tmp_path / "out.jsonl")
    assert (short["ended"], short["n_tokens"]) == ("max_new_tokens", 3)
    assert (long["ended"], long["n_prompt"] + long["n_tokens"]) == ("context", 64)
    assert complete["ended"] == "complete" and complete["answer"].strip() == "2 + 2 = 4."


def test_a_seed_is_the_lines_or_follows_from_the_jobs(monkeypatch, tmp_path):
    write(
        tmp_path / "in.jsonl",
        {"prompt": "a"},
        {"prompt": "a", "seed": 3},
        {"prompt": "a"},
        {"prompt": "a", "seed": 0},
    )
    seeds = []
    for seed in (1, 1, 2, None):
        engine = Engine()
        run(monkeypatch, tmp_path, engine, seed=seed, restart=True)
        seeds.append([request.seed for request in engine.seen])
    assert seeds[0] == seeds[1] and seeds[0][1::2] == [3, 0] and seeds[3] == [None, 3, None, 0]
    assert len({*seeds[0], *seeds[2]}) == 6  # no two lines, no two jobs
    engine = Engine()
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, tmp_path, Engine(dies_after=1), seed=1, restart=True)
    run(monkeypatch, tmp_path, engine, seed=1)
    assert [request.seed for request in engine.seen] == seeds[0][1:]  # as if nothing had happened


def test_a_seed_that_was_drawn_is_kept(monkeypatch, tmp_path):
    """Or a resumed job would end with other answers than it began with."""
    write(tmp_path / "in.jsonl", *({"prompt": f"a {n}"} for n in range(4)))
    first, second, third = Engine(dies_after=2), Engine(), Engine()
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, tmp_path, first, temperature=1.0)
    run(monkeypatch, tmp_path, second, temperature=1.0)
    run(monkeypatch, tmp_path, third, temperature=1.0, restart=True)
    drawn = [request.seed for request in first.seen]
    assert None not in drawn and len(set(drawn)) == 4
    assert [request.seed for request in second.seen] == [drawn[1], drawn[2]]  # 0 and 3 were answered first
    assert not {*drawn} & {request.seed for request in third.seen}


def test_each_answer_is_kept_before_the_next_is_taken(monkeypatch, tmp_path):
    write(tmp_path / "in.jsonl", *({"prompt": f"a {n}"} for n in range(4)))

    def engine(*arguments, **options):
        for n, answer in enumerate(Engine()(*arguments, **options), 1):
            assert len(read(tmp_path / "out.jsonl.partial")) == n
            yield answer

    run(monkeypatch, tmp_path, engine)


def test_an_engine_that_forgets_a_line_writes_no_output(monkeypatch, tmp_path):
    write(tmp_path / "in.jsonl", {"prompt": "a"}, {"prompt": "b"})
    with pytest.raises(JobError, match="1 of 2"):
        run(monkeypatch, tmp_path, lambda *arguments, **options: list(Engine()(*arguments, **options))[:1])
    assert names(tmp_path) == ["in.jsonl", "out.jsonl.partial"]


def test_options(tmp_path):
    for options, message in (
        ({"batch_size": 0}, "batch_size"),
        ({"bad_lines": "x"}, "bad_lines"),
        ({"temperature": -1}, "temperature"),
        ({"raw": True, "system": "a"}, "system prompt"),
    ):
        with pytest.raises(OptionError, match=message):
            JobOptions(tmp_path / "in", tmp_path / "out", **options)


def test_a_job_without_anything_to_generate_loads_no_model(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("mixtral_offload.apps.cli.load_model", None)
    write(tmp_path / "in.jsonl", {"promt": "a"}, "b")
    paths = ["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl")]
    assert main(["generate", *paths]) == 1
    assert "error: 2 of 2 lines cannot be answered" in capsys.readouterr().err
    assert main(["generate", *paths, "--bad-lines", "skip"]) == 0
    errors = capsys.readouterr().err
    assert (
        "skipped, 2 bad lines of 2:\nline 1: unknown key" in errors
        and "0 answers, 2 bad lines skipped" in errors
    )
    assert [answer["line"] for answer in read(tmp_path / "out.jsonl")] == [1, 2]


def rows(path) -> int:
    try:
        return path.read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def start(folder, name, *options):
    paths = ["--input", folder / "in.jsonl", "--output", folder / name, "--batch-size", "3"]
    process = subprocess.Popen([*COMMAND, *paths, *options], stderr=subprocess.PIPE, text=True)
    return process, folder / f"{name}.partial"


def wait_for(process, journal, n_rows):
    """Until the journal has so many lines, or the process has ended."""
    deadline = time.time() + 120
    while rows(journal) < n_rows and process.poll() is None:
        assert time.time() < deadline, f"{rows(journal)} of {n_rows} lines"
        time.sleep(0.002)


def test_killed_again_and_again_a_job_ends_as_if_nothing_had_happened(tmp_path):
    """JOB_KILLS times SIGKILL at random moments, before the journal exists and while it is written."""
    lines = [
        *STORIES,
        {"prompt": "What is 2 + 2?", "seed": 4},
        {"promt": "bad"},
        {"prompt": "What is 2 + 2?"},
    ]
    write(tmp_path / "in.jsonl", *lines)
    options = ["--max-tokens", "40", "--temperature", "0.8", "--seed", "5", "--bad-lines", "skip"]
    process, _ = start(tmp_path, "undisturbed.jsonl", *options)
    assert process.wait(120) == 0, process.stderr.read()
    undisturbed = (tmp_path / "undisturbed.jsonl").read_bytes()
    seed, kept, n_kills, n_done = random.randrange(10**6), 0, int(os.environ.get("JOB_KILLS", "4")), 0
    dice = random.Random(seed)
    while n_kills > 0 or n_done == 0:
        process, journal = start(tmp_path, "out.jsonl", *options)
        if n_kills > 0:
            wait_for(process, journal, kept + dice.randint(0, 4))
            time.sleep(dice.random() * (0.2 if kept else 1))
            process.kill()
        _, errors = process.communicate(timeout=120)
        if process.returncode == 0:  # done, also where the blow came too late
            assert (tmp_path / "out.jsonl").read_bytes() == undisturbed, f"dice {seed}"
            assert names(tmp_path) == ["in.jsonl", "out.jsonl", "undisturbed.jsonl"]
            assert kept <= 1 or f"12 answers, {kept - 1} of them from before, 1 bad line skipped" in errors
            (tmp_path / "out.jsonl").unlink()
            kept, n_done = 0, n_done + 1
            continue
        assert process.returncode == -signal.SIGKILL, errors
        output = tmp_path / "out.jsonl"  # killed between its last rename and the journal's end, at the worst
        assert rows(journal) >= kept or output.read_bytes() == undisturbed, f"dice {seed}: answers are lost"
        if not journal.exists() and output.exists():
            output.unlink()
        kept, n_kills = rows(journal), n_kills - 1


def test_ctrl_c_keeps_what_is_finished_and_a_second_process_is_refused(tmp_path, capsys):
    write(tmp_path / "in.jsonl", *STORIES)
    options = ["--max-tokens", "8"]
    process, journal = start(tmp_path, "out.jsonl", *options, "--throttle", "2MB")  # some 20 s in all
    try:
        wait_for(process, journal, 3)
        paths = ["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl")]
        command = ["generate", *paths, *options, "--device", "cpu", "--cache-size", "4"]
        assert main(command) == 1
        assert "another process is at work on this output" in capsys.readouterr().err
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and "Traceback" not in errors, errors
    n_kept = int(
        re.search(rf"(\d+) of 10 answers are kept in {journal}; the same command resumes the job", errors)[1]
    )
    assert 2 <= n_kept == rows(journal) - 1 < 10
    assert main(command) == 0
    assert f"10 answers, {n_kept} of them from before: " in capsys.readouterr().err
    assert [answer["id"] for answer in read(tmp_path / "out.jsonl")] == [story["id"] for story in STORIES]
    assert main(command) == 1
    assert "--restart" in capsys.readouterr().err
    assert json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])["ended"] == "max_new_tokens"


def test_the_plan_leaves_room_for_the_whole_batch(monkeypatch, tmp_path):
    """Ten stories of up to 300 tokens at once need more than the one context that a chat has."""
    from mixtral_offload.generation.batch import Batch

    sizes, step = [], Batch.step

    def spy(batch):
        sizes.append(len(batch.rows))
        step(batch)

    monkeypatch.setattr(Batch, "step", spy)
    write(tmp_path / "in.jsonl", *STORIES)
    files = ["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl")]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert main(["generate", *files, "--device", "cpu", "--max-tokens", "300"]) == 0
    assert max(sizes) == len(STORIES)
