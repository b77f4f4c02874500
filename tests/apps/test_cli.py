"""The command line, as a user runs it: processes, pipes, a terminal and Ctrl-C."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import pytest
import torch

from mixtral_offload import convert_checkpoint, from_pretrained
from mixtral_offload.apps.cli import main
from mixtral_offload.models.checkpoint import open_checkpoint
from mixtral_offload.weights.hqq import Quantization
from mixtral_offload.weights.source import DEMO
from tests.twin import limit, relative_error

COMMAND = [sys.executable, "-m", "mixtral_offload"]


def run(*arguments, stdin=None):
    return subprocess.run([*COMMAND, *arguments], input=stdin, capture_output=True, text=True, timeout=120)


def test_chat_from_a_pipe():
    done = run(
        "chat", "--device", "cpu", stdin="What is 2 + 3?\n\n/clear\nWhat is the capital of France?\n/exit\n"
    )
    assert done.returncode == 0, done.stderr
    assert "5" in done.stdout and "Paris" in done.stdout
    assert re.search(
        r"\d+ tokens, [\d.]+ tokens/s, \d+% of expert uses were hits, [\d.]+ MB moved", done.stderr
    )
    assert "Traceback" not in done.stderr


class Terminal:
    """A command on a terminal of its own."""

    def __init__(self, *arguments):
        self.end, child = pty.openpty()
        self.process = subprocess.Popen(
            [*COMMAND, *arguments], stdin=child, stdout=child, stderr=child, start_new_session=True
        )
        os.close(child)
        self.unread = ""

    def type(self, keys: str) -> None:
        os.write(self.end, keys.encode())

    def read_until(self, text: str, timeout: float = 60) -> str:
        deadline = time.time() + timeout
        while text not in self.unread:
            ready, _, _ = select.select([self.end], [], [], max(0, deadline - time.time()))
            assert ready, f"no {text!r} in {self.unread!r}"
            self.unread += os.read(self.end, 4096).decode(errors="replace")
        seen, _, self.unread = self.unread.partition(text)
        return seen


def test_chat_in_a_terminal_and_ctrl_c_stops_only_the_answer():
    terminal = Terminal("chat", "--device", "cpu", "--cache-size", "2", "--throttle", "3MB")
    try:
        terminal.read_until("you> ")
        terminal.type("Tell me a story about a fox.\n")
        terminal.read_until("fox.\r\n")  # the echo
        terminal.read_until(" ")  # the answer has begun
        terminal.process.send_signal(signal.SIGINT)
        terminal.read_until("[stopped]")
        terminal.read_until("you> ")
        terminal.type("What is 2 + 3?\n")
        assert "5" in terminal.read_until("you> ")
        terminal.type("\x04")
        assert "tokens/s" in terminal.read_until("moved")
        assert terminal.process.wait(30) == 0
    finally:
        terminal.process.kill()
        os.close(terminal.end)


def test_generate():
    done = run("generate", "What is the capital of France?", "--cache-size", "2", "--store", "disk")
    assert done.returncode == 0 and "Paris" in done.stdout and "on disk" in done.stderr
    done = run("generate", "-", "--max-tokens", "8", stdin="Hello!")
    assert done.returncode == 0 and done.stdout.strip()


def test_info(capsys, published):
    assert main(["info", "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert "6 layers x 8 experts, 2 per token" in text and "4-bit" in text and "fits here, on cpu" in text
    assert main(["info", "--model", str(published), "--vram", "1MB", "--device", "cpu"]) == 0
    assert "does not fit here" in capsys.readouterr().out


def test_convert(capsys, published, tmp_path):
    assert (
        main(["convert", str(published), str(tmp_path / "own"), "--bits", "4", "--attention-bits", "8"]) == 0
    )
    assert main(["info", "--model", str(tmp_path / "own"), "--device", "cpu"]) == 0
    assert "4-bit, group 64" in capsys.readouterr().out


@pytest.mark.both_products
def test_both_packings_of_three_bits_are_one_model(published, tmp_path):
    """The same logits from hqq's packing (ten values in 32 bits), ours, and hqq's repacked."""
    ten = Quantization(3, 64)
    hqq = convert_checkpoint(published, tmp_path / "hqq", ten, ten)
    folders = [hqq, tmp_path / "ours", tmp_path / "repacked"]
    for source, target in ((published, folders[1]), (hqq, folders[2])):
        assert main(["convert", str(source), str(target), "--bits", "3", "--attention-bits", "3"]) == 0
    stored = [open_checkpoint(folder) for folder in folders]
    assert [checkpoint.layout.quantization["up"].split for checkpoint in stored] == [False, True, True]
    assert [any("q_proj.W_high" in key for key in checkpoint.dense) for checkpoint in stored] == [
        False,
        True,
        True,
    ]
    assert (
        stored[1].layout.n_bytes < 0.9 * stored[0].layout.n_bytes
    )  # 3 + 32/64 bits a weight, against 3.5 + 32/64
    ids = torch.arange(5, 25).view(1, -1)
    with torch.no_grad():
        logits = [from_pretrained(folder, cache_size=2)(ids).logits for folder in folders]
    # the same weights; kernels add them in another order if they are packed in another one
    assert relative_error(logits[0], logits[1]) <= limit(0) and torch.equal(logits[1], logits[2])


def test_text_that_is_no_text():
    """Bytes that are not UTF-8 in, characters that the terminal lacks out, a reader that goes away."""
    ascii = {**os.environ, "PYTHONIOENCODING": "ascii"}
    for arguments, given in (([b"Say hello in Greek. \xff"], b""), (["-"], b"Say hello in Greek. \xff")):
        done = subprocess.run(
            [*COMMAND, "generate", *arguments], input=given, capture_output=True, env=ascii, timeout=120
        )
        assert done.returncode == 0 and done.stdout.isascii(), done.stderr
    process = subprocess.Popen([*COMMAND, "info"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.wait(60) == 141 and process.stderr.read() == b""


def test_a_chat_outlives_an_unexpected_error(capsys, monkeypatch):
    class Chat:
        total = "the end"

        def send(self, text):
            yield "so far"
            raise ZeroDivisionError("by zero")

    lines = iter(["hello", "again", "/exit"])
    monkeypatch.setattr("mixtral_offload.apps.cli.session", lambda arguments: Chat())
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert main(["chat"]) == 0
    assert capsys.readouterr().err.count("error: ZeroDivisionError: by zero") == 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["chat", "--model", "./nowhere"], "nowhere"),
        (["generate", "hi", "--cache-size", "1"], "impossible cache_size"),
        (["generate", "hi", "--cache-size", "9"], "impossible cache_size"),
        (["generate", "hi", "--vram", "much"], "cannot read a size"),
        (["info", "--device", "tpu"], "unknown device"),
        (["info", "--model", "./nowhere"], "nowhere is not a folder"),
        (["info", "--prefetch", "-1"], "impossible prefetch"),
        (["generate", "hi", "--max-tokens", "0"], "impossible max_new_tokens"),
        (["generate", "hi", "--top-p", "7"], "impossible top_p"),
        (["generate", "hi", "--temperature", "-1"], "impossible temperature"),
        (["generate", "hi", "--seed", str(2**70)], "impossible seed"),
        (["generate", "hi", "--tokenizer", "/usr"], "cannot read the tokenizer"),
        (["generate", "--input", "nowhere", "--output", "x"], "cannot read the input"),
        (["generate", "--input", "x", "--output", "x"], "write over its input"),
        (["generate", "--input", "x", "--output", "y", "--batch-size", "0"], "impossible batch_size"),
        (["convert", "demo", "x", "--device", "banana"], "unknown device"),
        (["convert", str(DEMO), "x", "--default-cache-size", "99"], "impossible default cache size"),
    ],
)
def test_errors_are_one_message(capsys, arguments, message):
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and "Traceback" not in error


@pytest.mark.parametrize(
    "arguments",
    [["chat", "--cache-sizes", "4"], ["generate"], ["fly"], ["generate", "hi", "--cache-size", "x"],
     ["generate", "hi", "--raw", "--system", "Be brief."],
     ["generate", "hi", "--input", "a", "--output", "b"],
     ["generate", "--input", "a"], ["generate", "--output", "b"], ["generate", "hi", "--output", "b"],
     ["generate", "hi", "--batch-size", "4"], ["generate", "hi", "--bad-lines", "skip"],
     ["generate", "hi", "--restart"],
     ["generate", "--input", "-", "--output", "b"], ["generate", "--input", "a", "--output", "-"],
     ["generate", "--input", "a", "--output", "b", "--raw", "--system", "Be brief."],
     ["convert", str(DEMO), "x", "--group-size", "32"]],
)  # fmt: skip
def test_unknown_options_are_refused(capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "error:" in capsys.readouterr().err
