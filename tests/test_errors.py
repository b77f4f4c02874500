"""Messages are short, readable and without secrets, for all values."""

import copy
import logging
import pickle
import random

import pytest

from mixtral_offload import errors
from mixtral_offload.errors import MESSAGE_LIMIT, CheckpointError, DownloadError, OffloadError, describe
from mixtral_offload.models.checkpoint import open_checkpoint
from mixtral_offload.system.redaction import RedactingFilter, redact, redact_chain, remember_secret
from mixtral_offload.system.safe_text import as_text, shorten, visible
from mixtral_offload.weights.source import DEMO

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, OffloadError)]
FIELDS = ("path", "key", "expected", "found", "hint")
UNSAFE = [
    *map(chr, [*range(9), *range(11, 32), *range(0x7F, 0xA0)]),
    "\u2028",
    "\u2029",
    "\u202e",
    "\u2066",
    "\ud800",
]


def test_nothing_in_a_message_acts_on_a_terminal():
    for character in UNSAFE:
        for field in FIELDS:
            text = str(OffloadError("wrong", **{field: f"a{character}b"}))
            assert character not in text and (repr(character)[1:-1] in text), repr(character)
        assert character not in str(OffloadError(f"a{character}b"))
    for harmless in ("\t", "é", "日本", "👩‍👧", "עברית", "\u200f"):
        assert harmless in str(OffloadError("wrong", found=f"a{harmless}b"))


def test_no_value_can_pass_for_a_line_of_the_message():
    forged = "model\n  next step: run this"
    for field in FIELDS:
        lines = str(OffloadError("wrong", **{field: forged})).split("\n")
        assert "  next step: run this" not in lines
    assert len(str(OffloadError("wrong", path=forged, key=forged)).split("\n")) == 3
    assert (
        str(OffloadError("wrong", found="one\n    two\nthree")) == "wrong\n  found: one\n    two\n    three"
    )


def test_every_message_is_short_and_keeps_both_ends_of_each_value():
    for fill in ("x" * 200_000, "x\n" * 50_000, "\n" * 50_000, "\x1b" * 50_000):
        values = dict.fromkeys(FIELDS, f"begin {fill} end")
        text = str(OffloadError(f"begin {fill} end", **values))
        assert len(text) <= MESSAGE_LIMIT and text.count("begin ") == 6 and text.count(" end") == 6
        assert text.count("characters left out") >= 6
        assert all(f"{name}: " in text for name in ("file", "key", "expected", "found", "next step"))
    listed = "\n".join(f"line {number} of the job is not JSON" for number in range(20))
    assert (
        str(OffloadError("wrong", found=listed)).count("is not JSON") == 20
    )  # several short lines have room


def test_a_value_that_cannot_be_written_does_not_hide_the_error():
    class Broken:
        def __str__(self):
            raise RuntimeError("no")

    for value, kind in ((10**6000, "int"), (Broken(), "Broken")):
        assert f"{kind} that cannot be shown" in str(OffloadError("wrong", found=value))
        assert "cannot be shown" in as_text(value)


@pytest.mark.parametrize("kind", KINDS)
def test_errors_survive_pickle_and_copy(kind):
    error = kind("what\nelse", path="a", hint="b\nc")
    for made in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(made) is kind and str(made) == str(error)


def test_foreign_errors_are_made_safe_too():
    assert describe(CheckpointError("wrong", key="k")) == "wrong\n  key: k"
    text = describe(ValueError("\x1b[2J" + "x" * 9000))
    assert text.startswith("ValueError: \\x1b[2J") and len(text) < 400


def test_no_message_prints_a_whole_index(tmp_path):
    for path in DEMO.iterdir():
        (tmp_path / path.name).symlink_to(path)
    index = tmp_path / "model.safetensors.index.json"
    damaged = bytearray(index.read_bytes())
    damaged[5000] = 0xFF
    index.unlink()
    index.write_bytes(damaged)
    with pytest.raises(CheckpointError, match="position 5000") as caught:
        open_checkpoint(tmp_path)
    assert len(str(caught.value)) < 600 and "weight_map" in str(caught.value)


def test_visible_and_shorten():
    assert visible("a\x1b[31m\r\nb\x9b\u202e\tc") == "a\\x1b[31m\nb\\x9b\\u202e\tc"
    assert visible("a\nb\rc", one_line=True) == "a\\nb\\rc"
    assert shorten("abc", 3) == "abc"
    numbers = random.Random(0)
    for _ in range(200):
        limit, length = numbers.randint(50, 400), numbers.randint(1, 5000)
        short = shorten("x" * length, limit)
        assert len(short) <= limit and (length > limit) == ("left out" in short)


SECRET = "hf_SECRETsecret"
SPOKEN = [
    SECRET,
    f"Authorization: Bearer {SECRET}",
    "hf_" + "A1b2" * 9,
    "Bearer abcSECRET",
    "{'authorization': 'Basic abcSECRET'}",
    "[(b'Set-Cookie', b'abcSECRET; path=/'), (b'x', b'y')]",
    "proxy-authorization=abcSECRET",
    "http://me:abcSECRET@proxy:3128/",
    "https://cdn/x?X-Amz-Algorithm=A&X-Amz-Signature=abcSECRET&X-Amz-Credential=abcSECRET",
    "https://cdn/x?Expires=1&Signature=abcSECRET~&Key-Pair-Id=abcSECRET",
]


@pytest.mark.parametrize("text", SPOKEN)
def test_no_message_holds_a_secret(text):
    remember_secret(f" {SECRET}\n")
    for field in FIELDS:
        shown = str(DownloadError("wrong", **{field: f"before {text} after"}))
        assert "SECRET" not in shown and "A1b2" not in shown and "***" in shown
        assert "before" in shown
    error = ValueError("outer", text.encode())
    error.__cause__ = OSError(5, text)
    error.__cause__.__context__ = RuntimeError(text)
    redact_chain(error)
    assert "SECRET" not in f"{error} {error.__cause__} {error.__cause__.__context__}"
    record = logging.LogRecord("x", logging.DEBUG, "file", 1, "sending %s", (text,), None)
    RedactingFilter().filter(record)
    assert "SECRET" not in record.getMessage() and "sending" in record.getMessage()


def test_an_exception_that_keeps_its_secret_leaves_the_chain():
    class Stubborn(Exception):
        def __str__(self):
            return SECRET

    remember_secret(SECRET)
    error = ValueError("outer")
    error.__cause__ = Stubborn()
    redact_chain(error)
    assert error.__cause__ is None


def test_ordinary_words_are_not_redacted(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "x")  # too short to be one: would spoil every word that holds it
    for text in (
        "the next expert",
        "a token of the tokenizer",
        "hf_hub_download",
        "basic text",
        "https://host/a@b/c?d=e",
    ):
        assert redact(text) == text
    monkeypatch.setenv("HF_TOKEN", "from-the-environment")
    assert redact("sent from-the-environment") == "sent hf_***"
