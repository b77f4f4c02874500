"""`inspect` and `plan` from Python: what the commands print, and the numbers behind it."""

from mixtral_offload import inspect, plan
from mixtral_offload.apps.cli import main

DEVICE = {"vram": "1GB", "ram": "1GB", "link_bandwidth": "12GB/s"}


def test_plan_is_what_the_command_prints(capsys):
    found = plan("demo", **DEVICE)
    assert main(["plan", "demo", "--vram", "1GB", "--ram", "1GB", "--link", "12GB/s"]) == 0
    assert str(found) == capsys.readouterr().out.strip()
    assert found.plan.sizes.total == 48 and found.projection.tokens_per_s > 0


def test_inspect_is_what_the_command_prints(capsys):
    options = {"device": "cpu", "cache_size": 3, "vram": "500MB"}
    found = inspect("demo", **options)
    assert main(["info", "--device", "cpu", "--cache-size", "3", "--vram", "500MB"]) == 0
    assert str(found) == capsys.readouterr().out.strip()
    assert set(found.plan.slots.values()) == {3} and found.refusal is None and found.download is None


def test_inspect_says_what_does_not_fit():
    found = inspect("demo", device="cpu", vram="1MB")
    assert found.plan is None and "does not fit here" in str(found) and str(found.refusal) in str(found)
