"""Errors while a model runs, a trace is drawn or a chat is typed: one message, and the rest continues."""

import os
import pty
import resource
import shutil
import subprocess
import sys
import threading

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from mixtral_offload import ChatSession, GenerationRequest, from_pretrained, generate_batch, load_tokenizer
from mixtral_offload.analysis.recall import measure_recall
from mixtral_offload.apps.cli import main
from mixtral_offload.apps.trace_report import read_prompts
from mixtral_offload.errors import CheckpointError, GenerationError, OptionError
from mixtral_offload.weights.source import DEMO

QUESTION = "What is 47 + 38?"
COMMAND = [sys.executable, "-m", "mixtral_offload"]


def model_of_layers(folder, n):
    """A plain checkpoint with random weights and the shipped model's tokenizer."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=1536, hidden_size=64, intermediate_size=64, num_hidden_layers=n, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, max_position_embeddings=256,
    )  # fmt: skip
    MixtralForCausalLM(config).half().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, folder / name)
    return folder


# Disks


@pytest.fixture
def on_disk(tmp_path, offloaded):
    shutil.copytree(DEMO, tmp_path / "model")
    return tmp_path / "model", offloaded(tmp_path / "model", cache_size=2, store="disk")


@pytest.mark.parametrize("damage", ["truncate", "remove"])
def test_files_that_change_under_a_running_model(on_disk, damage):
    folder, model = on_disk
    session = ChatSession(model, load_tokenizer(folder), max_new_tokens=16)
    answer = "".join(session.send(QUESTION))
    kept = list(session.messages)
    for path in sorted(folder.glob("model-*.safetensors"))[:48]:
        path.rename(path.with_suffix(".kept"))
        if damage == "truncate":
            path.write_bytes(b"")
    model.offload.cache.store.open.cache_clear()
    model.offload.cache.clear()
    for ask in (
        lambda: list(session.send("Tell me a story.")),
        lambda: list(generate_batch(model, [GenerationRequest.chat(session.tokenizer, QUESTION)])),
        lambda: model(torch.tensor([[1, 5, 7]])),
        lambda: model.generate(torch.tensor([[1, 5, 7]]), max_new_tokens=2),
    ):
        with pytest.raises(CheckpointError, match=r"file: .*model-000\d\d-of-00049\.safetensors"):
            ask()
    assert session.messages == kept
    for path in folder.glob("*.kept"):
        path.replace(path.with_suffix(".safetensors"))
    model.offload.cache.store.open.cache_clear()
    session.clear()
    assert "".join(session.send(QUESTION)) == answer


def test_few_open_files_are_enough():
    command = ["generate", QUESTION, "--store", "disk", "--cache-size", "2", "--device", "cpu"]
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (24, 24))\n"
        f"from mixtral_offload.apps.cli import main; raise SystemExit(main({command!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "85" in done.stdout, done.stderr


def test_a_full_disk_during_a_trace(tmp_path, capsys):
    (tmp_path / "p.txt").write_text("What is 2 + 2?\n")
    command = [
        "trace",
        str(tmp_path / "p.txt"),
        str(tmp_path / "out"),
        "--max-tokens",
        "3",
        "--device",
        "cpu",
    ]
    for limit in (1000, 6000, 20_000, 60_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            assert main(command) == 1
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert "error: cannot write the report\n  file: " in capsys.readouterr().err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
@pytest.mark.parametrize("command", [["info"], ["generate", "Hi", "--max-tokens", "3"]])
def test_a_full_disk_behind_standard_output(command):
    with open("/dev/full", "w") as full:
        pipes = {"stdout": full, "stderr": subprocess.PIPE, "text": True, "timeout": 120}
        done = subprocess.run([*COMMAND, *command, "--device", "cpu"], **pipes)
    assert done.returncode == 1 and done.stderr.count("error: ") == 1 and "No space left" in done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


# Forward passes


def test_what_fails_inside_the_model_is_one_message(offloaded, monkeypatch):
    model, tokenizer = offloaded(DEMO, cache_size=8), load_tokenizer()
    monkeypatch.setattr(model.base_model.norm, "forward", lambda hidden: 1 / 0)
    session = ChatSession(model, tokenizer)
    for ask in (session.send, lambda text: generate_batch(model, [GenerationRequest.chat(tokenizer, text)])):
        with pytest.raises(GenerationError, match=r"(?s)failed while computing.*ZeroDivisionError") as caught:
            list(ask(QUESTION))
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
    monkeypatch.undo()
    assert "85" in "".join(session.send(QUESTION))


def test_a_throttle_that_would_take_hours_is_refused(capsys):
    with pytest.raises(OptionError, match=r"(?s)impossible throttle.*expected: \d+ bytes/s or more"):
        from_pretrained(device="cpu", cache_size=2, throttle=1)
    assert main(["generate", "Hi", "--device", "cpu", "--throttle", "1"]) == 1


def test_a_reader_that_fails_during_an_answer_ends_it(offloaded):
    session = ChatSession(offloaded(DEMO, cache_size=2, throttle="1MB"), load_tokenizer())
    with pytest.raises(ZeroDivisionError):
        for _ in session.send("Tell me a story about a fox."):
            1 / 0  # noqa: B018
    assert not [thread for thread in threading.enumerate() if thread.name == "generate"]


# Traces


def test_a_trace_of_a_model_of_one_layer(tmp_path, capsys):
    folder = model_of_layers(tmp_path / "model", 1)
    (tmp_path / "p.txt").write_text("Hello!\n")
    command = [
        "trace",
        str(tmp_path / "p.txt"),
        str(tmp_path / "out"),
        "--model",
        str(folder),
        "--device",
        "cpu",
    ]
    for n_tokens in ("4", "1"):
        assert main([*command, "--max-tokens", n_tokens, "--cache-size", "2"]) == 0, capsys.readouterr().err
    assert (tmp_path / "out" / "usage.png").exists() and not (tmp_path / "out" / "recall.png").exists()
    with pytest.raises(OptionError, match="one layer"):
        measure_recall([None], None)


def test_impossible_lengths_are_refused_before_the_model_is_loaded(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        "mixtral_offload.apps.cli.load", lambda arguments: pytest.fail("the model was loaded")
    )
    (tmp_path / "p.txt").write_text("Hello!\n")
    for n_tokens in ("0", "-3"):
        assert main(["trace", str(tmp_path / "p.txt"), str(tmp_path / "out"), "--max-tokens", n_tokens]) == 1
        assert "impossible max_new_tokens" in capsys.readouterr().err


def test_prompts_are_read_as_they_are(tmp_path):
    text = "one\u2028still one\x0bstill\x85one\r\nset\ttwo\r\n\n\x1cthree\n"
    (tmp_path / "p.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert read_prompts(tmp_path / "p.txt") == [
        ("prompts", "one\u2028still one\x0bstill\x85one"),
        ("set", "two"),
        ("prompts", "\x1cthree"),
    ]


@pytest.mark.parametrize(
    "name, text",
    [
        ("prompts.jsonl", '{"prompt": "Hello!"}\n{"prompt": "And you?"}\n'),
        ("prompts.JSONL", "not even JSON\n"),
        ("prompts.txt", '\n{"messages": [{"role": "user", "content": "Hello!"}], "id": 3}\n'),
        ("tabs.txt", '{"prompt":\t"Hello!"}\n'),
    ],
)
def test_a_file_of_jobs_is_not_traced_as_text(tmp_path, capsys, monkeypatch, name, text):
    """Its braces were taken for the prompt."""
    monkeypatch.setattr("mixtral_offload.apps.cli.load", lambda arguments: pytest.fail("a model was loaded"))
    (tmp_path / name).write_text(text)
    assert main(["trace", str(tmp_path / name), str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "this is a file of JSON Lines" in error and name in error and "one prompt on each line" in error
    assert "write the prompts alone into a text file" in error
    assert not (tmp_path / "out").exists()


def test_prompts_that_look_like_json_are_prompts(tmp_path):
    lines = ['{"a": 1}', '["prompt"]', '{"prompt": "one of them alone"}', "3"]
    (tmp_path / "p.txt").write_text("\n".join(lines))
    assert read_prompts(tmp_path / "p.txt") == [("prompts", line) for line in lines]


def test_dollars_are_no_formulas(tmp_path, capsys):
    sets = ["$\\frac{$", "a $x^2$ $\\foo$ costs $5 and $6", "\\$", "<b>&", "_^{", "$$"]
    lines = [f"{name}\tIt costs $5 or $\\frac{{a$ $x_$\n" for name in sets]
    (tmp_path / "p.txt").write_text("".join(lines))
    command = [
        "trace",
        str(tmp_path / "p.txt"),
        str(tmp_path / "out"),
        "--max-tokens",
        "2",
        "--device",
        "cpu",
    ]
    assert main(command) == 0, capsys.readouterr().err


# Terminals


def chat_on_a_terminal(keys: bytes, monkeypatch):
    """The messages that `chat` sends for these keys, typed at once."""
    from mixtral_offload.apps import terminal

    sent = []

    class Session:
        total, ended, messages = "the end", None, []

        def send(self, text):
            sent.append(text)
            yield "ok"

        def clear(self):
            sent.append("cleared")

    monkeypatch.setattr(terminal, "notices", lambda session: [])
    end, child = pty.openpty()
    with open(child) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        os.write(end, keys)
        terminal.chat_loop(Session(), "")
    os.close(end)
    return sent


@pytest.mark.parametrize(
    "keys, messages",
    [
        (b"one\ntwo\n\nfour\n\x04", ["one\ntwo\n\nfour"]),
        (b"one\n/clear\ntwo\nthree\n/exit\n", ["one", "cleared", "two\nthree"]),
        (b"one\n\x04", ["one"]),
        (b"/clear\none\n\x04", ["cleared", "one"]),
    ],
)
def test_lines_pasted_together_are_one_message(keys, messages, monkeypatch):
    assert chat_on_a_terminal(keys, monkeypatch) == messages


def test_lines_from_a_pipe_are_messages_of_their_own():
    pipes = {"input": "What is 2 + 2?\nWhat is 5 + 5?\n", "capture_output": True, "text": True}
    done = subprocess.run([*COMMAND, "chat", "--device", "cpu"], timeout=120, **pipes)
    assert done.returncode == 0 and "4" in done.stdout and "10" in done.stdout
