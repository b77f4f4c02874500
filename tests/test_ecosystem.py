"""benchmarks/ecosystem: wrong figures fail, missing programs are skipped, foreign failures are faults."""

import subprocess
import sys

import pytest
import torch

from benchmarks.ecosystem import checks, modelling_tests
from mixtral_offload.errors import OptionError


def test_close_measures_and_a_nan_never_passes():
    a = torch.tensor([1.0, 2.0])
    assert checks.close("same", [a], [a], 0).passed
    assert checks.close("near", [a + 1e-3], [a], 1e-4).figure == pytest.approx(5e-4, rel=1e-3)
    assert not checks.close("near", [a + 1e-3], [a], 1e-4).passed
    assert not checks.close("lost", [a * float("nan")], [a], 1).passed


def test_equal_counts_and_keeps_the_first_difference():
    check = checks.equal("answers", ["a", "b", "c"], ["a", "x", "y"])
    assert (check.figure, check.n, check.passed) == (2, 3, False)
    assert check.message == "'b' instead of 'x'"
    assert checks.equal("answers", ["a"], ["a"]).passed


def test_refused_wants_this_kind_of_error():
    def refuse():
        raise OptionError("not like this")

    assert checks.refused("ours", refuse, OptionError).passed
    assert not checks.refused("another's", lambda: {}["key"], OptionError).passed
    assert not checks.refused("nothing", lambda: None, OptionError).passed


def test_a_missing_program_is_skipped_and_an_exception_fails(capsys):
    def raising():
        yield checks.equal("first", [1], [1])
        raise RuntimeError("no more")

    skipped = checks.run_program("none", ("no-such-distribution",), raising)
    assert skipped.skipped.startswith("no-such-distribution") and skipped.passed and not skipped.checks
    failed = checks.run_program("torch", ("torch",), raising)
    assert [check.passed for check in failed.checks] == [True, False] and not failed.passed
    assert "RuntimeError: no more" in capsys.readouterr().out


def test_machine_names_the_processor():
    assert {"processor", "instruction_sets", "threads", "python"} <= checks.machine().keys()


TESTS = """
import unittest
from mixtral_offload.errors import OptionError

class ModelTest(unittest.TestCase):
    def test_good(self): pass
    def test_correct_missing_keys(self): raise OptionError("output_loading_info is not supported", found=True)
    def test_other(self): raise OptionError("output_loading_info is not supported", found=True)
    def test_not_listed(self): raise OptionError("something else")
    def test_foreign(self): {}["key"]
    def test_skipped(self): self.skipTest("no")
"""


def test_failures_are_told_apart(tmp_path):
    (tmp_path / "test_model.py").write_text(TESTS)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--tb=short",
        "-p",
        "no:cacheprovider",
        f"--junitxml={tmp_path}/report.xml",
    ]
    subprocess.run(
        [*command, f"--rootdir={tmp_path}", "-c", "/dev/null", tmp_path / "test_model.py"],
        capture_output=True,
    )
    found = modelling_tests.read_report(tmp_path / "report.xml")
    own = {test: (outcome if outcome == "skipped" else "passed", "") for test, (outcome, _) in found.items()}
    failures = {failure.test.partition(".")[2]: failure for failure in modelling_tests.compare(own, found)}
    assert failures.keys() == {"test_correct_missing_keys", "test_other", "test_not_listed", "test_foreign"}
    kinds = {name: (failure.is_own_message, bool(failure.by_design)) for name, failure in failures.items()}
    assert kinds == {
        "test_correct_missing_keys": (True, True),
        "test_other": (True, False),
        "test_not_listed": (True, False),
        "test_foreign": (False, False),
    }
    assert failures["test_foreign"].message == "KeyError: 'key'"
    assert failures["test_other"].message.endswith("found: True")
