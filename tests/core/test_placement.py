"""Plans on the sizes of real GPUs and hosts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixtral_offload.core.placement import Sizes, make_plan
from mixtral_offload.errors import CapacityError, OptionError
from mixtral_offload.units import parse_size

EXPERT = 66_400_000
MIXTRAL = Sizes(range(32), 8, 2, EXPERT)


def test_a_free_t4_keeps_on_the_device_what_its_small_ram_cannot_hold():
    plan = make_plan(MIXTRAL, 190 * EXPERT, int(9.5e9))
    assert plan.store == "ram" and plan.n_resident == 113 and plan.n_stored == 143
    assert plan.n_resident + sum(plan.slots.values()) == 190
    assert plan.ram_bytes <= 9.5e9
    assert any("113 experts are resident" in reason for reason in plan.reasons)


def test_enough_ram_means_no_resident_experts():
    plan = make_plan(MIXTRAL, 190 * EXPERT, int(20e9))
    assert plan.store == "ram" and plan.n_resident == 0
    assert set(plan.slots.values()) == {5, 6} and sum(plan.slots.values()) == 190


def test_too_little_of_both_goes_to_disk_with_the_reason():
    plan = make_plan(MIXTRAL, 100 * EXPERT, int(5e9))
    assert plan.store == "disk" and plan.n_resident == 0 and sum(plan.slots.values()) == 100
    assert any("are on disk" in reason for reason in plan.reasons)


def test_a_large_device_needs_no_store():
    plan = make_plan(MIXTRAL, 300 * EXPERT, 0)
    assert plan.store is None and plan.n_resident == 256 and sum(plan.slots.values()) == 0


def test_a_given_cache_size():
    plan = make_plan(MIXTRAL, 190 * EXPERT, int(20e9), cache_size=4)
    assert set(plan.slots.values()) == {4} and plan.n_resident == 0


def test_on_the_cpu_device_and_ram_are_one():
    assert make_plan(MIXTRAL, 300 * EXPERT, 0, shared_memory=True).store is None
    assert make_plan(MIXTRAL, 200 * EXPERT, 0, shared_memory=True).store == "disk"
    assert make_plan(MIXTRAL, 390 * EXPERT, 0, cache_size=4, shared_memory=True).store == "ram"
    assert make_plan(MIXTRAL, 380 * EXPERT, 0, cache_size=4, shared_memory=True).store == "disk"


def test_refusals_name_the_largest_cache_that_fits():
    with pytest.raises(CapacityError, match=r"largest cache_size that fits is 3"):
        make_plan(MIXTRAL, 100 * EXPERT, 0, cache_size=4)
    with pytest.raises(CapacityError, match="no cache fits"):
        make_plan(MIXTRAL, 60 * EXPERT, 0)
    with pytest.raises(CapacityError, match=r"impossible cache_size\n  expected: 2 .*\n  found: 1"):
        make_plan(MIXTRAL, 200 * EXPERT, 0, cache_size=1)
    with pytest.raises(CapacityError, match="impossible cache_size"):
        make_plan(MIXTRAL, 200 * EXPERT, 0, cache_size=9)
    with pytest.raises(CapacityError, match="RAM cannot hold"):
        make_plan(MIXTRAL, 70 * EXPERT, 0, store="ram")
    with pytest.raises(OptionError, match="unknown store"):
        make_plan(MIXTRAL, 70 * EXPERT, 0, store="tape")
    with pytest.raises(OptionError, match="unknown cache_size"):
        make_plan(MIXTRAL, 70 * EXPERT, 0, cache_size="all")


@given(
    layers=st.integers(1, 12),
    n_experts=st.integers(2, 16),
    top_k=st.integers(1, 4),
    room=st.integers(0, 200),
    ram=st.integers(0, 200),
    asked=st.one_of(st.just("auto"), st.integers(1, 16)),
    store=st.sampled_from(["auto", "ram", "disk"]),
    shared=st.booleans(),
)
def test_every_plan_keeps_within_both_budgets(layers, n_experts, top_k, room, ram, asked, store, shared):
    sizes = Sizes(range(layers), n_experts, min(top_k, n_experts), 10)
    try:
        plan = make_plan(sizes, room * 10, ram * 10, cache_size=asked, store=store, shared_memory=shared)
    except CapacityError:
        return
    assert plan.device_bytes <= room * 10
    assert plan.ram_bytes <= ((room * 10 - plan.device_bytes) if shared else ram * 10)
    for layer in sizes.layers:
        n_here = len(plan.resident[layer]) + plan.slots[layer]
        assert sizes.top_k <= n_here <= n_experts  # a token's experts are all on the device at once
        if asked != "auto" and plan.store:
            assert plan.slots[layer] <= asked
    if plan.store is None:
        assert plan.n_resident == sizes.total
    assert plan.reasons and str(plan)


def test_sizes():
    assert (
        parse_size("15GB") == 15_000_000_000 and parse_size("1.5 GiB") == 1.5 * 2**30 and parse_size(7) == 7
    )
    assert parse_size("12GB/s") == 12_000_000_000 and parse_size("1.5 MiB/s ") == 1.5 * 2**20
    for wrong in ("fifteen", "15 parsec", "1.2.3GB", "12GB/h", "12/sGB", "12 GB/ s"):
        with pytest.raises(OptionError, match="cannot read a size"):
            parse_size(wrong)


def test_a_cache_size_for_each_layer():
    sizes = Sizes(range(4), 8, 2, EXPERT)
    plan = make_plan(sizes, 20 * EXPERT, 40 * EXPERT, cache_size=[2, 3, 8, 4])
    assert plan.store == "ram" and list(plan.slots.values()) == [2, 3, 8, 4]
    assert make_plan(sizes, 20 * EXPERT, 20 * EXPERT, cache_size=[2, 3, 8, 4]).store == "disk"
    with pytest.raises(CapacityError, match="16 experts fit in all"):
        make_plan(sizes, 16 * EXPERT, 40 * EXPERT, cache_size=[2, 3, 8, 4])
    with pytest.raises(CapacityError, match="impossible cache_size"):
        make_plan(sizes, 20 * EXPERT, 40 * EXPERT, cache_size=[2, 3, 1, 4])
    with pytest.raises(OptionError, match="4 numbers"):
        make_plan(sizes, 20 * EXPERT, 40 * EXPERT, cache_size=[2, 3])
