"""Short forms of the checks; `python -m tests.reliability.run` is the full one."""

import os

import pytest

from .at_once import check_at_once
from .drops import check_drops
from .fuzz import check_fuzz
from .identity import check_identity
from .interrupts import check_interrupts
from .malformed import check_malformed
from .mutants import MUTANTS, fails_without_a_fault, noticed_by
from .read_errors import check_read_errors
from .soak import check_soak


def test_logits_are_bit_identical():
    result = check_identity(n_prompts=3, n_tokens=8, sizes=(2, 5), prefetch=(0, 4))
    assert (result.wrong, result.tried) == (0, 3 * 8 * 8)


def test_answers_after_interrupts():
    result = check_interrupts(n=8, seed=1, n_tokens=12)
    assert (result.wrong, result.tried) == (0, 8)


def test_dropped_models_give_their_memory_back():
    result = check_drops(n=12, warm_up=20)
    assert not result.wrong, result.details


@pytest.mark.skipif(not hasattr(os, "preadv"), reason="faults are put into preadv")
def test_answers_during_and_after_read_errors():
    result = check_read_errors(n=12)
    assert not result.wrong, result.details
    assert result.details["ended_with_an_error"] > 0


def test_damaged_checkpoints():
    result = check_malformed()
    assert not result.wrong, result.details["wrong"]
    assert result.tried >= 60 and result.details["refused"] > 0


def test_fuzzed_headers_indexes_and_configurations():
    result = check_fuzz(headers=3000, indexes=1000, configs=1000, seed=1)
    assert not result.wrong, result.details


def test_two_at_once():
    result = check_at_once(n=1)
    assert not result.wrong, result.details


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.what)
def test_faults_are_noticed(mutant):
    test = noticed_by(mutant)
    assert test is not None
    assert not fails_without_a_fault(test)


def test_a_short_soak():
    result = check_soak(turns=30, tokens=800, seed=3)
    assert not result.wrong, result
    assert result.details["interrupts"] > 0 and result.details["models"] >= 2
