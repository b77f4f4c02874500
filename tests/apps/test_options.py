"""The options are declared once: signature, help, command line and README say the same."""

import inspect
import subprocess
import sys
from pathlib import Path

from mixtral_offload import from_pretrained
from mixtral_offload.apps.parser import OFFLOAD, build_parser, given
from mixtral_offload.core.options import declared

ROOT = Path(__file__).parents[2]


def test_what_is_written_out_is_what_is_declared():
    subprocess.run([sys.executable, "docs/options.py", "--check"], cwd=ROOT, check=True)


def test_the_signature_has_every_option_with_its_default():
    parameters = inspect.signature(from_pretrained).parameters
    assert [*parameters] == ["source", *declared(), "hub", "others"]
    assert all(parameters[name].default == of.default for name, of in declared().items())
    documented = inspect.getdoc(from_pretrained)
    assert all(f"\n    {name}: " in documented for name in declared())


def test_the_command_line_passes_on_what_was_given_and_nothing_else():
    parser = build_parser(
        dict.fromkeys(("chat", "generate", "trace", "download", "info", "plan", "convert", "verify"))
    )
    assert given(parser.parse_args(["info"]), OFFLOAD) == {}
    options = ["--cache-size", "3", "--no-compile", "--shared-slots", "--throttle", "2GB", "--store", "disk"]
    assert given(parser.parse_args(["info", *options]), OFFLOAD) == {
        "cache_size": 3, "compile": False, "shared_slots": True, "throttle": "2GB", "store": "disk",
    }  # fmt: skip
