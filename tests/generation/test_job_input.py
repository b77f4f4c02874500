"""A job's input: every line is understood exactly or refused by its number, before anything is generated."""

import json
import os

import pytest

from mixtral_offload.errors import JobError
from mixtral_offload.generation.job_input import BadLine, read_lines
from mixtral_offload.generation.tokenizer import load_tokenizer
from mixtral_offload.weights.source import DEMO
from tests.job import Engine, names, read, run, write

USER = {"role": "user", "content": "Hello!"}
BAD = [
    (b'{"prompt": "Hello!"', "not JSON: Expecting ',' delimiter at column 20"),
    (b"Hello!", "not JSON: Expecting value at column 1"),
    (b'{"prompt": "\xff"}', "not UTF-8: invalid start byte at byte 13"),
    (b'{"prompt": "Hello!", "seed": NaN}', "not JSON: NaN is not a number"),
    (b'{"prompt": "Hello!", "id": 1e999}', "not JSON: 1e999 is not a number"),
    (b'{"prompt": "Hello!", "id": ' + b"[" * 100_000, "not readable as JSON: nested too deeply"),
    (b'{"prompt": "Hello!", "id": ' + b"1" * 5000 + b"}", "not readable as JSON"),
    (b'{"prompt": "Hello!", "prompt": "Goodbye!"}', "key 'prompt' is there twice"),
    ("Hello!", 'expected an object like {"prompt": "..."}, found "Hello!"'),
    ({"promt": "Hello!"},
     "unknown key 'promt'; expected prompt or messages, and if wanted system, max_tokens"),
    ({"prompt": "Hello!", "temperature": 1}, "unknown key 'temperature'"),
    ({"id": 3}, "expected either prompt or messages, found neither"),
    ({"prompt": "Hello!", "messages": [USER]}, "expected either prompt or messages, found both"),
    ({"prompt": 3}, "prompt: expected a string, found 3"),
    ({"prompt": ""}, "the prompt is empty"),
    ({"prompt": " \n"}, "the prompt is empty"),
    ({"prompt": "hello " * 2000}, "the prompt is too long: expected less than 1024 tokens"),
    ({"messages": []}, "messages: expected a list of {role, content}, found []"),
    ({"messages": "Hello!"}, 'messages: expected a list of {role, content}, found "Hello!"'),
    ({"messages": ["Hello!"]}, 'message 1: expected an object of role and content, found "Hello!"'),
    ({"messages": [USER, {**USER, "name": "Ana"}]},
     "message 2: expected an object of role and content, found keys"),
    ({"messages": [{"role": "usr", "content": "Hello!"}]},
     'message 1, role: expected system, user, assistant, found "usr"'),
    ({"messages": [{"role": [], "content": "Hello!"}]},
     "message 1, role: expected system, user, assistant, found []"),
    ({"messages": [{"role": "user", "content": ["Hello!"]}]},
     'message 1, content: expected a string, found ["Hello!"]'),
    ({"messages": [USER, {"role": "assistant", "content": "Hi!"}]},
     "the last message: expected the user's, found the assistant's"),
    ({"messages": [{"role": "user", "content": ""}]}, "the prompt is empty"),
    ({"prompt": "Hello!", "system": None}, "system: expected a string, found null"),
    ({"messages": [{"role": "system", "content": "a"}, USER], "system": "b"}, "two system prompts"),
    ({"prompt": "Hello!", "max_tokens": 0}, "max_tokens: expected 1 or more, found 0"),
    ({"prompt": "Hello!", "max_tokens": 2.0}, "max_tokens: expected a whole number, found 2.0"),
    ({"prompt": "Hello!", "max_tokens": True}, "max_tokens: expected a whole number, found true"),
    ({"prompt": "Hello!", "seed": 2**70}, "seed: expected a whole number of 64 bits"),
    ({"prompt": "Hello!", "seed": "1"}, 'seed: expected a whole number, found "1"'),
]  # fmt: skip


def test_bad_lines_are_refused_by_number_before_anything_is_generated(monkeypatch, tmp_path):
    for line, message in BAD:
        engine = Engine()
        write(tmp_path / "in.jsonl", {"prompt": "Hello!"}, b"", line)
        with pytest.raises(JobError) as caught:
            run(monkeypatch, tmp_path, engine)
        assert f"1 of 2 lines cannot be answered\n  file: {tmp_path / 'in.jsonl'}" in str(caught.value)
        assert f"line 3: {message}" in str(caught.value), caught.value
        assert engine.seen == [] and names(tmp_path) == ["in.jsonl"]


def test_skipped_bad_lines_keep_their_place(monkeypatch, tmp_path):
    lines = [item for line, _ in BAD for item in ({"prompt": "Hello!"}, line)]
    write(tmp_path / "in.jsonl", *lines)
    job = run(monkeypatch, tmp_path, Engine(), bad_lines="skip")
    answers = read(tmp_path / "out.jsonl")
    assert [answer["line"] for answer in answers] == list(range(1, len(lines) + 1))
    for answer, (_, message) in zip(answers[1::2], BAD):
        assert answer.keys() == {"line", "error"} and message in answer["error"]
    assert all("Hello!" in answer["answer"] for answer in answers[::2])
    assert f"{len(BAD)} bad lines skipped" in job.summary
    assert "\nline 2: not JSON" in job.skipped and job.skipped.endswith(f"\nand {len(BAD) - 20} more")


def test_a_template_that_refuses_a_conversation_is_reported_by_line(monkeypatch, tmp_path):
    refusing = (
        "{% if messages|length > 1 %}{{ raise_exception('Conversation roles must alternate') }}{% endif %}Hi"
    )
    tokenizer = load_tokenizer(DEMO)
    tokenizer.chat_template = refusing
    monkeypatch.setattr("tests.job.load_tokenizer", lambda folder: tokenizer)
    write(tmp_path / "in.jsonl", {"messages": [USER]}, {"messages": [USER, USER]})
    refused = "line 2: the chat template refuses this conversation;.*found: Conversation roles must alternate"
    with pytest.raises(JobError, match=refused):
        run(monkeypatch, tmp_path, Engine())


def test_ids_that_the_model_does_not_have_are_reported_by_line(monkeypatch, tmp_path):
    tokenizer = load_tokenizer(DEMO)
    tokenizer.add_tokens(["<|more|>"])
    monkeypatch.setattr("tests.job.load_tokenizer", lambda folder: tokenizer)
    write(tmp_path / "in.jsonl", {"prompt": "Hello!"}, {"prompt": "Hello <|more|>"})
    with pytest.raises(
        JobError, match=r"line 2: the tokenizer does not belong to this model.* 1536, of a vocabulary"
    ):
        run(monkeypatch, tmp_path, Engine())


def test_only_newlines_end_a_line(tmp_path):
    """str.splitlines also splits at characters that JSON strings may hold."""
    text = "one\u2028two\x85three\u2029four"
    content = '\ufeff{"prompt": "' + text + '"}\r\n\r\n  \n{"prompt": "last, without a newline"}'
    (tmp_path / "in.jsonl").write_bytes(content.encode())
    _, lines = read_lines(tmp_path / "in.jsonl")
    assert [(line.number, line.messages[0]["content"]) for line in lines] == [
        (1, text),
        (4, "last, without a newline"),
    ]


def test_ids_come_back_as_they_were(monkeypatch, tmp_path):
    ids = [None, 0, -1.5, "é\u2028", "\ud800", {"a": [1, {"b": None}]}, [], 10**40, True]
    write(tmp_path / "in.jsonl", *({"prompt": "Hello!", "id": value} for value in ids), {"prompt": "Hello!"})
    run(monkeypatch, tmp_path, Engine())
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_bytes().split(b"\n")[:-1]]
    assert [answer["id"] for answer in answers[:-1]] == ids
    assert list(answers[0]) == ["line", "id", "answer", "ended", "n_prompt", "n_tokens"]
    assert "id" not in answers[-1]


def test_half_characters_become_whole_ones(monkeypatch, tmp_path):
    """As in a chat: the tokenizer would raise."""
    half = (
        b'{"messages": [{"role": "system", "content": "\\ud800"}, {"role": "user", "content": "Hi \\ud800"}]}'
    )
    write(tmp_path / "in.jsonl", half, {"prompt": "Hi \ufffd", "system": "\ufffd"})
    engine = Engine()
    run(monkeypatch, tmp_path, engine)
    assert engine.seen[0].ids == engine.seen[1].ids


def test_a_lines_own_system_prompt_takes_the_place_of_the_jobs(monkeypatch, tmp_path):
    system = {"role": "system", "content": "Be brief."}
    write(
        tmp_path / "in.jsonl",
        {"prompt": "Hello!"},
        {"prompt": "Hello!", "system": "Be long."},
        {"messages": [{**system, "content": "Be long."}, USER]},
        {"messages": [system, USER]},
        {"prompt": "Hello!", "system": ""},
    )
    engine, plain = Engine(), Engine()
    run(monkeypatch, tmp_path, engine, system="Be brief.")
    brief, long, also_long, also_brief, none = (request.ids for request in engine.seen)
    assert brief == also_brief != long == also_long != none
    write(tmp_path / "in.jsonl", {"prompt": "Hello!"})
    run(monkeypatch, tmp_path, plain, restart=True)
    assert plain.seen[0].ids == none


def test_raw_prompts(monkeypatch, tmp_path):
    write(
        tmp_path / "in.jsonl", {"prompt": "Once upon"}, {"messages": [USER]}, {"prompt": "a", "system": "b"}
    )
    engine = Engine()
    job = run(monkeypatch, tmp_path, engine, raw=True, bad_lines="skip")
    assert job.tokenizer.decode(engine.seen[0].ids) == job.tokenizer.bos_token + "Once upon"
    assert [bad.error.split(";")[0] for bad in job.bad] == [
        "messages has no place in a --raw job",
        "system has no place in a --raw job",
    ]


def test_no_lines(monkeypatch, tmp_path):
    for content in (b"", b"\n \r\n", b"\xef\xbb\xbf"):
        (tmp_path / "in.jsonl").write_bytes(content)
        with pytest.raises(JobError, match="no lines in the input"):
            run(monkeypatch, tmp_path, Engine())
        assert names(tmp_path) == ["in.jsonl"]


def test_inputs_that_are_no_files(tmp_path):
    with pytest.raises(JobError, match=r"(?s)cannot read the input.*nowhere.*No such file"):
        read_lines(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(JobError, match=r"(?s)not a file.*resume from"):
            read_lines(path)


def test_a_line_that_is_bad_in_two_ways_is_one_bad_line(tmp_path):
    write(tmp_path / "in.jsonl", {"promt": 3, "max_tokens": "x"})
    _, lines = read_lines(tmp_path / "in.jsonl")
    assert [type(line) for line in lines] == [BadLine]
