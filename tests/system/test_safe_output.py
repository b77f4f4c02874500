"""Text from outside cannot act on a terminal: answers, file names, values of configurations."""

import io
import json
import os
import pty
import subprocess
import sys

import pytest
from tqdm import tqdm

from mixtral_offload.apps import notebook
from mixtral_offload.apps.cli import main
from mixtral_offload.apps.terminal import chat_loop
from mixtral_offload.system.safe_output import SafeStream, safe_output
from mixtral_offload.weights.source import DEMO

EVIL = "\x1b[2J\x1b]0;title\x07\x9b31m\u202eabc\rover\x08"
COMMAND = [sys.executable, "-m", "mixtral_offload"]


class Terminal(io.StringIO):
    """A stream that claims to be a terminal."""

    def isatty(self):
        return True


class Chat:
    """A session whose model answers with escape sequences."""

    total, context_length, context_used, max_new_tokens, ended = f"the end {EVIL}", 100, 0, 10, "complete"

    def send(self, text):
        yield "first\n\t"
        yield from EVIL
        yield "last"

    regenerate = send

    def clear(self):
        pass


@pytest.fixture
def chat(monkeypatch):
    monkeypatch.setattr("mixtral_offload.apps.cli.session", lambda arguments: Chat())
    lines = iter(["hello", "/exit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))


def is_safe(text):
    return not set(EVIL) - set("[2J]0;title31mabcover") & set(text)


@pytest.mark.parametrize("command", [["chat"], ["generate", "hello"]])
def test_an_answer_cannot_act_on_a_terminal(chat, command, monkeypatch):
    out, err = Terminal(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    assert main(command) == 0
    assert is_safe(out.getvalue()) and is_safe(err.getvalue()), (out.getvalue(), err.getvalue())
    assert "first\n\t\\x1b[2J\\x1b]0;title\\x07\\x9b31m\\u202eabc\\rover\\x08last\n" in out.getvalue()
    assert "the end \\x1b" in err.getvalue()
    assert (sys.stdout, sys.stderr) == (out, err)


@pytest.mark.parametrize("command", [["chat"], ["generate", "hello"]])
def test_an_answer_that_goes_into_a_file_stays_as_it_is(chat, command, capsys):
    assert main(command) == 0
    assert f"first\n\t{EVIL}last\n" in capsys.readouterr().out


def test_the_plain_chat_of_python_is_safe_too(chat, monkeypatch):
    out = Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    chat_loop(Chat())
    assert is_safe(out.getvalue()) and "\\x1b[2J" in out.getvalue() and sys.stdout is out


def on_a_terminal(*arguments, cwd):
    end, child = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [*COMMAND, *arguments], stdout=child, stderr=child, stdin=child, cwd=cwd, env=environment
    )
    os.close(child)
    seen = b""
    try:
        while piece := os.read(end, 4096):
            seen += piece
    except OSError:  # how Linux says that the other end is closed
        pass
    os.close(end)
    return process.wait(60), seen.decode().replace("\r\n", "\n")


def test_names_and_values_cannot_act_on_a_terminal(tmp_path):
    """Every command that shows a folder's name or what is in it, on a terminal of its own."""
    evil = "m\x1b[31mX\x1b]0;title\x07\u202e"
    good, bad = tmp_path / f"good{evil}", tmp_path / f"bad{evil}"
    good.symlink_to(DEMO)
    bad.mkdir()
    (bad / "config.json").write_text(json.dumps({"model_type": f"ll{evil}ama"}))
    (tmp_path / f"prompts{evil}").write_text("")
    commands = [
        ("info", "--device", "cpu", "--model", good.name),
        ("info", "--device", "cpu", "--model", bad.name),
        ("plan", good.name, "--vram", "1GB", "--ram", "1GB", "--link", "1GB"),
        ("plan", bad.name, "--vram", "1GB", "--ram", "1GB", "--link", "1GB"),
        ("generate", "hi", "--model", bad.name),
        ("generate", "--input", f"prompts{evil}", "--output", "x"),
        ("trace", f"prompts{evil}", f"out{evil}"),
        ("convert", good.name, f"new{evil}"),
        ("download", f"owner/{evil}"),
        ("chat", f"--{evil}"),
    ]
    for command in commands:
        status, seen = on_a_terminal(*command, cwd=tmp_path)
        assert is_safe(seen.replace("\r", "")), (command, seen)
        assert "\\x1b[31m" in seen or status == 0, (command, seen)


def test_the_same_errors_are_safe_in_a_log(tmp_path):
    """Standard error goes into a file, which is read on a terminal later."""
    (tmp_path / "m\x1b[31m").mkdir()
    done = subprocess.run(
        [*COMMAND, "info", "--model", str(tmp_path / "m\x1b[31m")], capture_output=True, text=True
    )
    assert done.returncode == 1 and "\\x1b[31m" in done.stderr and "\x1b" not in done.stderr


def test_a_traceback_is_safe(monkeypatch, tmp_path):
    code = "from mixtral_offload.apps import cli\ndef fail(_): raise RuntimeError('\\x1b[2J')\n"
    code += "cli.run_info = fail\ncli.main(['info'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "RuntimeError: \\x1b[2J" in done.stderr and "\x1b" not in done.stderr


def test_progress_bars_still_move(monkeypatch):
    err = Terminal()
    stream = SafeStream(err, keep_return=True)
    for _ in tqdm(range(3), file=stream, desc="a\x1b[2Jb", mininterval=0):
        pass
    assert (
        err.getvalue().count("\ra\\x1b[2Jb") >= 3
        and "\x1b" not in err.getvalue()
        and "\\r" not in err.getvalue()
    )
    SafeStream(err).write("\rX")
    assert err.getvalue().endswith("\\rX")


def test_a_safe_stream_is_the_stream_in_all_else(tmp_path):
    with open(tmp_path / "x", "w", encoding="utf-8") as file:
        stream = SafeStream(file)
        print("a\x07", file=stream, end="", flush=True)
        stream.writelines(["b\x07", "c"])
        assert stream.fileno() == file.fileno() and stream.encoding == "utf-8" and not stream.isatty()
        stream.flush()
    assert (tmp_path / "x").read_text() == "a\\x07b\\x07c"


def test_streams_that_are_not_there(monkeypatch):
    """As under pythonw."""
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    with safe_output():
        assert sys.stdout is None and sys.stderr is None


def test_notebooks_show_names_only(capsys):
    notebook.choose_model(EVIL)
    assert is_safe(capsys.readouterr().out)
