"""`mixtral-offload plan`, as a user gives it: from a config.json alone, for devices that are not here."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from transformers import AutoConfig

from mixtral_offload.analysis.planner import PlanRequest, answer, best_knobs, knobs
from mixtral_offload.analysis.synthetic import sticky_trace
from mixtral_offload.apps.cli import main
from mixtral_offload.core.trace import RoutingTrace
from mixtral_offload.errors import CapacityError, OptionError
from mixtral_offload.models.checkpoint import open_checkpoint
from mixtral_offload.models.sizes import model_sizes
from mixtral_offload.runtime import options
from mixtral_offload.runtime.options import MARGIN_BYTES
from mixtral_offload.weights import kernels as packed
from tests.models.test_sizes import QWEN3_30B, mixtral_config

DEVICE = ["--vram", "15GB", "--ram", "10GB", "--link", "12GB/s"]


@pytest.fixture
def mixtral(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(mixtral_config()))
    return tmp_path


@pytest.fixture(scope="module")
def sizes():
    config = mixtral_config()
    return model_sizes(AutoConfig.for_model(config.pop("model_type"), **config))


def small(layers=4):
    config = mixtral_config(layers, hidden=256, intermediate=512, vocab=1000)
    return model_sizes(AutoConfig.for_model(config.pop("model_type"), **config))


def room(sizes, n: int, **given) -> PlanRequest:
    """A device with room for n experts, and RAM for all."""
    request = PlanRequest.parse(sizes, **{"vram": 1, "ram": "100GB", "link": "1GB/s", "prefetch": 0, **given})
    others = sum(request.needs.values()) + MARGIN_BYTES + request.options.n_staging * sizes.expert_bytes
    return replace(request, vram=others + n * sizes.expert_bytes)


def test_mixtral_on_a_free_colab(capsys, mixtral):
    """The first plan many will ask for: 15 GB on the device, 10 of 12.7 GB of RAM left for experts."""
    assert main(["plan", str(mixtral), *DEVICE]) == 0
    text = capsys.readouterr().out
    assert "46.7 billion parameters, 12.9 per token" in text and "66.4 MB at 2 bits" in text
    assert "106 resident, 150 in RAM" in text and "projection" in text and "not measured" in text
    assert 'routing like "mixtral"' in text and "measured on Mixtral-8x7B" in text
    rate = float(re.search(r"([\d.]+) tokens/s: ", text)[1])
    copies = float(re.search(r"([\d.]+) copies per token", text)[1])
    link = 1 / (copies * 5.53e-3)
    assert 0.7 * link < rate < link  # the link is the limit, and mostly busy
    gains = re.findall(r"--(\S+) .*: ([\d.]+) -> ([\d.]+) tokens/s", text)
    assert len(gains) == 3 and gains[0][0] == "link" and all(float(b) > float(a) == rate for _, a, b in gains)
    assert main(["plan", str(mixtral / "config.json"), *DEVICE]) == 0  # the file itself
    assert capsys.readouterr().out == text


def test_bit_widths_and_other_families(capsys, tmp_path, mixtral):
    assert (
        main(["plan", str(mixtral), *DEVICE, "--bits", "3", "--ram", "30GB", "--attention-bits", "16"]) == 0
    )
    text = capsys.readouterr().out
    for words in ("71.7 MB at 3 bits", "attention at 16 bits", "4.4 of 8 experts per layer"):
        assert words in text
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt_oss", "num_hidden_layers": 4}))
    assert main(["plan", str(tmp_path), *DEVICE, "--prefetch", "0", "--bits", "16"]) == 0
    text = capsys.readouterr().out
    assert "a plan only: from_pretrained does not run gpt_oss" in text and "predictions" not in text


def test_a_large_device_copies_nothing(capsys, mixtral):
    assert main(["plan", str(mixtral), "--vram", "24GB", "--ram", "8GB", "--link", "12GB/s"]) == 0
    text = capsys.readouterr().out
    assert "256 resident" in text and "none is ever copied" in text and "copies per token" not in text


def test_small_ram_goes_to_disk_with_its_speed(capsys, mixtral):
    assert main(["plan", str(mixtral), *DEVICE, "--ram", "4GB", "--disk", "2GB/s"]) == 0
    text = capsys.readouterr().out
    assert "256 on disk" in text and "33.2 ms at 2 GB/s (the disk)" in text


def test_of_a_hub_repository_only_the_configuration_is_fetched(capsys, mixtral, monkeypatch):
    fetched = []

    def fetch(*names, revision):
        fetched.append((*names, revision))
        return mixtral / "config.json"

    monkeypatch.setattr("mixtral_offload.analysis.reports.fetch_file", fetch)
    assert main(["plan", "someone/model", *DEVICE, "--revision", "abc"]) == 0
    assert fetched == [("someone/model", "config.json", "abc")]
    assert "106 resident" in capsys.readouterr().out


def test_the_plan_is_from_pretrained_s(monkeypatch, published):
    """On a device with the same free memory, `plan_for` makes the same plan for a checkpoint."""
    monkeypatch.setattr(options, "budgets", lambda asked: (asked.vram, asked.ram))  # no GPU is here
    monkeypatch.setattr(packed, "_missing", lambda device: None)  # and what it needs for compiling
    checkpoint = open_checkpoint(published)
    sizes = model_sizes(checkpoint.config).at(2, 4)
    for n in (6, 9, 15, 23, 24):
        request = room(sizes, n, prefetch=2, ram=17 * sizes.expert_bytes)
        assert answer(request).plan == options.plan_for(checkpoint, replace(request.options, compile=True))


def test_curves(sizes):
    """The higher the locality, the fewer copies; chance hits the share of cached experts."""
    found = {
        name: answer(room(sizes, 32 * 4, curve=name)).projection for name in ("chance", "mixtral", "demo")
    }
    assert found["chance"].hit_rate == pytest.approx(0.5, abs=0.02)
    assert found["mixtral"].hit_rate == pytest.approx(0.59, abs=0.035)
    assert found["chance"].tokens_per_s < found["mixtral"].tokens_per_s < found["demo"].tokens_per_s


def test_a_trace_gives_each_layer_its_own_slots(capsys, tmp_path):
    """Layer 0 always uses the same two experts: more slots are worth nothing there."""
    sizes = small()
    trace = sticky_trace(80, 4, 8, 2, 0.1)
    trace.experts[:, 0] = [3, 5]
    trace = RoutingTrace.from_routing(trace.experts, trace.weights, 8)
    found = answer(room(sizes, 16, trace=trace))
    assert found.plan.slots[0] == 2 and sum(found.plan.slots.values()) == 16
    assert re.search(r"by layer \[2, .*: [\d.]+% hits on the trace", str(found.plan))
    even = answer(room(sizes, 16, trace=trace, cache_size=4))
    assert found.projection.hit_rate > even.projection.hit_rate
    few = answer(room(sizes, 16, trace=trace, ram=20 * sizes.expert_bytes))
    assert few.plan.n_resident == 12 or few.plan.store == "disk"


def test_a_trace_from_its_file_with_the_predictions_it_has(capsys, tmp_path, mixtral):
    trace = sticky_trace(48, 32, 8, 2, 0.3, recall=0.4, n_predictions=1)
    trace.save(tmp_path / "trace.safetensors")
    assert main(["plan", str(mixtral), *DEVICE, "--trace", str(tmp_path / "trace.safetensors")]) == 0
    text = capsys.readouterr().out
    assert "routing as recorded: 48 tokens" in text and "prefetch 1, look-ahead 1" in text


def test_knobs_are_what_they_say(sizes):
    request = PlanRequest.parse(sizes.at(3), vram="15GB", ram="20GB", link="12GB/s")
    base = answer(request)
    found = best_knobs(base, 10)
    speeds = [changed.projection.tokens_per_s for _, changed in found]
    assert speeds == sorted(speeds, reverse=True) and min(speeds) > 1.01 * base.projection.tokens_per_s
    named = {text.split()[0]: changed for text, changed in knobs(request)}
    assert set(named) == {
        "--bits",
        "--context-length",
        "--vram",
        "--ram",
        "--link",
        "--prefetch",
        "--look-ahead",
    }
    assert named["--bits"].sizes.bits == 2 and named["--context-length"].context_length == 2048
    assert named["--vram"].vram == 17e9 and named["--ram"].ram == 24e9 and named["--link"].link == 24e9
    assert named["--prefetch"].prefetch == 0 and named["--look-ahead"].look_ahead == 2
    for changed in named.values():  # one thing at a time
        fields = ("sizes", "vram", "ram", "link", "context_length", "prefetch", "look_ahead")
        assert sum(getattr(changed, name) != getattr(request, name) for name in fields) == 1
    assert len(best_knobs(base)) == 3


def test_too_small_a_device_says_what_fits(sizes):
    request = PlanRequest.parse(sizes.at(4), vram="9GB", ram="20GB", link="12GB/s", context_length=16384)
    with pytest.raises(CapacityError) as caught:
        answer(request)
    text = str(caught.value)
    assert "4-bit experts does not fit" in text and "2 experts per layer" in text
    hint = text.split("what fits: ")[1]
    assert "--context-length" in hint
    for option in hint.split(", or "):  # every one of them does fit
        name, value = option.split()
        changed = {
            "--bits": lambda v: {"sizes": sizes.at(int(v))},
            "--context-length": lambda v: {"context_length": int(v)},
            "--vram": lambda v: {"vram": int(float(v[:-2]) * 1e9)},
            "--prefetch": lambda v: {"prefetch": 0},
        }
        assert answer(replace(request, **changed[name](value))).plan
    least = float(hint.split("--vram ")[1].removesuffix("GB"))
    with pytest.raises(CapacityError):  # and a bit less than that does not
        answer(replace(request, vram=int((least - 0.11) * 1e9)))


@pytest.mark.parametrize(
    "changed, message",
    [
        (["--vram", "6GB"], "does not fit on this device"),
        (["--vram", "0GB"], "impossible vram"),
        (["--ram", "-3"], "cannot read a size"),
        (["--link", "fast"], "cannot read a size"),
        (["--link", "0GB/s"], "impossible link"),
        (["--bandwidth", "0"], "impossible bandwidth"),
        (["--context-length", "0"], "impossible context_length"),
        (["--cache-size", "9"], "impossible cache_size"),
        (["--cache-size", "7"], "largest cache_size that fits is 5"),
        (["--prefetch", "9"], "impossible predictions"),
        (["--look-ahead", "32"], "impossible predictions"),
        (["--look-ahead", "0"], "impossible look_ahead"),
        (["--curve", "hope"], "unknown curve"),
        (["--trace", "nowhere"], "cannot read a trace"),
    ],
)
def test_impossible_numbers_are_one_message(capsys, mixtral, changed, message):
    assert main(["plan", str(mixtral), *DEVICE, *changed]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and "Traceback" not in error


@pytest.mark.parametrize(
    "content, message",
    [("{", "cannot read the configuration"), ("[]", "cannot read the configuration"),
     ('{"model_type": "unheard-of"}', "cannot read the configuration"),
     ('{"model_type": "llama", "num_hidden_layers": 2}', "llama is a dense model"),
     ('{"model_type": "mixtral", "num_hidden_layers": 2, "hidden_size": "wide"}', "config"),
     ('{"model_type": "mixtral", "num_hidden_layers": 2, "num_experts_per_tok": 99}',
      "at most 8, the number of experts")],
)  # fmt: skip
def test_wrong_configurations_are_one_message(capsys, tmp_path, content, message):
    (tmp_path / "config.json").write_text(content)
    assert main(["plan", str(tmp_path), *DEVICE]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and "Traceback" not in error


def test_no_configuration_at_all(capsys, tmp_path):
    assert main(["plan", str(tmp_path), *DEVICE]) == 1
    assert "no configuration here" in capsys.readouterr().err
    assert main(["plan", "./nowhere", *DEVICE]) == 1
    assert "not a folder" in capsys.readouterr().err


def test_a_trace_of_another_model(capsys, tmp_path, mixtral):
    sticky_trace(8, 3, 8, 2, 0.3).save(tmp_path / "trace.safetensors")
    assert main(["plan", str(mixtral), *DEVICE, "--trace", str(tmp_path / "trace.safetensors")]) == 1
    assert "another model" in capsys.readouterr().err


def test_many_small_experts_are_planned_within_seconds(sizes):
    """Qwen3-30B-A3B: fewer predictions than needed experts, each as often right as on Mixtral."""
    sizes = model_sizes(AutoConfig.for_model("qwen3_moe", **QWEN3_30B))
    request = PlanRequest.parse(sizes.at(4), vram="12GB", ram="24GB", link="12GB/s")
    found = answer(request)
    assert found.plan.store == "ram" and 40 < np.mean(list(found.plan.slots.values())) < 128
    assert answer(replace(request, prefetch=0)).projection.tokens_per_s < found.projection.tokens_per_s
    with pytest.raises(OptionError, match="impossible prefetch"):
        PlanRequest.parse(sizes, vram=1, ram=1, link=1, prefetch=-1)
