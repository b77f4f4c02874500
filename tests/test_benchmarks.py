"""The big benchmarks, at toy shapes: the results that they write, and that these are true."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mixtral_offload import RoutingTrace, load_tokenizer, replay
from mixtral_offload.errors import OptionError
from mixtral_offload.experiments.batching import workload
from mixtral_offload.models.checkpoint import open_checkpoint
from mixtral_offload.weights.hqq import PAPER, dequantize
from tests.twin import limit

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
LAYERS, TOKENS, STAY = 3, 12, 0.5
TASK = dict.fromkeys(("ram", "prompt", "tokens", "stay", "seed", "recall", "threads"), 1) | {"device": "cpu"}
SHAPE = {"layers": LAYERS, "hidden": 256, "intermediate": 512, "vocab": 256}


@pytest.fixture(autouse=True)
def path(monkeypatch):
    """Benchmarks are programs: they import each other from their own folder."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def run(program: str, *arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, BENCHMARKS / program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def fullsize(folder: Path, *arguments) -> dict:
    out = folder / "result.json"
    shape = [text for name, value in SHAPE.items() for text in (f"--{name}", value)]
    ended = run("fullsize.py", "--folder", folder / "files", "--out", out, "--threads", 1, *shape, *arguments)
    assert ended.returncode == 0, ended.stderr
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> dict:
    """One prompt token, so that every pass is of one token, as in a trace made by `from_routing`."""
    folder = tmp_path_factory.mktemp("fullsize")
    arguments = ["--prompt", 1, "--tokens", TOKENS, "--stay", STAY, "--ram", "200MB", "--cache-size", 3]
    found = fullsize(folder, *arguments, "--rivals", "accelerate", "--accelerate-layers", 2)
    assert (folder / "result.png").stat().st_size > 0
    assert list((folder / "files").iterdir()) == []  # what was made is gone
    return found


def test_fullsize_writes_what_it_measured(result):
    ours, accelerate = (result["contestants"][name] for name in ("ours", "accelerate"))
    for row in (ours, accelerate):
        assert "failed" not in row
        assert len(row["seconds_per_token"]) == TOKENS and row["prompt_tokens"] == 1
        assert row["tokens_per_s"] == pytest.approx(TOKENS / sum(row["seconds_per_token"]))
        assert 0 < row["anon_bytes"] <= row["peak_rss_bytes"]
    assert result["ratios"] == {
        "ours over accelerate": pytest.approx(ours["tokens_per_s"] / accelerate["tokens_per_s"])
    }
    assert ours["run"]["store"] == "disk" and ours["link_bytes_per_s"] > 0
    assert set(accelerate["by_page_cache"]) == {"kept", "dropped before each token"}
    assert accelerate["layers_measured"] == 2


def test_the_cache_follows_the_forced_routing(result):
    from forced_routing import sticky_experts

    ours = result["contestants"]["ours"]
    experts = sticky_experts(1 + TOKENS, LAYERS, 8, 2, STAY, result["settings"]["seed"])
    replayed = replay(RoutingTrace.from_routing(experts, np.ones(experts.shape), 8), 3)
    assert ours["hit_rate_with_prompt"] == pytest.approx(replayed.hit_rate)
    decoding = replayed.hit[replayed.trace.use_pass > 0]
    assert ours["hit_rate"] == pytest.approx(decoding.mean())
    assert ours["bytes_per_token"] * TOKENS == (~decoding).sum() * ours["run"]["expert_bytes"]
    assert ours["replay_agrees"]


def test_a_failure_is_written_and_the_others_go_on(tmp_path):
    found = fullsize(tmp_path, "--ram", "1MB", "--prompt", 1, "--tokens", 1, "--rivals")
    assert "CapacityError" in found["contestants"]["ours"]["failed"]
    assert found["ratios"] == {}


def test_fullsize_refuses_a_folder_of_another_shape(tmp_path):
    from bigfiles import make_checkpoint
    from shapes import mixtral_config

    from mixtral_offload.errors import CheckpointError

    config = mixtral_config(1, 256, 512, vocab=256)
    assert make_checkpoint(tmp_path / "checkpoint", config, 2)[0]
    assert not make_checkpoint(tmp_path / "checkpoint", config, 2)[0]
    with pytest.raises(CheckpointError, match="another shape"):
        make_checkpoint(tmp_path / "checkpoint", config, 4)


def test_fullsize_refuses_a_disk_that_is_too_small(tmp_path):
    from bigfiles import check_disk

    from mixtral_offload.errors import CapacityError

    check_disk(tmp_path, 1000, "a trifle")
    with pytest.raises(CapacityError, match="disk is too small"):
        check_disk(tmp_path, 10**18, "the checkpoint")


def test_the_ballast_holds_memory_while_it_is_wanted():
    import psutil
    from processes import ballast, check_machine_ram

    from mixtral_offload.errors import OptionError

    def held() -> int:
        return sum(child.memory_info().rss for child in psutil.Process().children() if child.is_running())

    total, size = psutil.virtual_memory().total, 100_000_000
    before = held()
    with ballast(total - size) as n_bytes:
        assert n_bytes == size
        assert held() - before > size
    assert held() - before < size / 2
    check_machine_ram(total, total - 10**9)
    with pytest.raises(OptionError, match="machine-ram"):
        check_machine_ram(total, total)


def test_the_size_estimated_before_writing_is_nearly_the_size_written(tmp_path):
    from bigfiles import checkpoint_bytes, make_checkpoint
    from shapes import CONFIGS, mixtral_config

    for family, make in CONFIGS.items():
        config = make(2, 512, 1024, n_experts=8, vocab=512)
        make_checkpoint(tmp_path / family, config, 2)
        written = sum(path.stat().st_size for path in (tmp_path / family).iterdir())
        assert checkpoint_bytes(config, 2) == pytest.approx(written, rel=0.02)
    published = 256 * 66.4e6  # bytes of its experts, each in a file of its own
    assert published < checkpoint_bytes(mixtral_config(), 2) < 1.08 * published


@pytest.mark.both_products
@torch.no_grad()
def test_the_16_bit_checkpoint_is_the_same_model(tmp_path, offloaded):
    from bigfiles import make_checkpoint
    from contestants import Task
    from dequantized import write_16bit
    from shapes import mixtral_config
    from transformers import AutoModelForCausalLM

    make_checkpoint(tmp_path / "checkpoint", mixtral_config(3, 256, 512, vocab=256), 2)
    task = TASK | {"files": str(tmp_path / "plain"), "scaled_layers": 3, "dtype": "float16"}
    task = Task(str(tmp_path / "checkpoint"), **task)
    write_16bit(task)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    ids = torch.arange(3, 20)[None]
    packed = offloaded(tmp_path / "checkpoint", cache_size=8)
    assert (plain(ids).logits - packed(ids).logits).abs().max() < limit(1e-4, 5e-3)
    source = open_checkpoint(tmp_path / "checkpoint")
    buffer = torch.empty(source.layout.n_bytes, dtype=torch.uint8)
    source.read_expert((2, 7), buffer)
    up = dequantize(source.layout.views(buffer)["up"], (512, 256), PAPER[2])
    assert torch.equal(plain.model.layers[2].mlp.experts.gate_up_proj[7, 512:], up.float())


def test_a_prompt_is_one_pass_of_the_forced_trace():
    from forced_routing import forced_trace, sticky_experts

    experts = sticky_experts(20, 2, 8, 2, 0.0)
    settings = {"n_experts": 8, "expert_bytes": 5, "slots": [3, 3], "resident": [[], []]}
    settings |= {"policy": "lru", "shared_slots": False}
    trace = forced_trace(experts, 16, settings)
    assert trace.passes.tolist() == [0] * 16 + [1, 2, 3, 4]
    of_prompt = trace.use_expert[(trace.use_pass == 0) & (trace.use_layer == 1)]
    assert of_prompt.tolist() == sorted(set(experts[:16, 1].ravel().tolist()))
    assert replay(trace).trace.n_passes == 5


def test_sticky_experts_stay_as_often_as_stated():
    from forced_routing import sticky_experts

    same = np.sort(sticky_experts(50, 2, 8, 2, 1.0), -1)
    assert (same == same[0]).all()
    for stay in (0.0, 0.6):
        experts = sticky_experts(4000, 2, 8, 2, stay)
        assert (experts[..., 0] != experts[..., 1]).all()
        again = (experts[1:, :, :, None] == experts[:-1, :, None]).any(-1).mean()
        assert again == pytest.approx(stay + (1 - stay) * _drawn_again(stay), abs=0.02)


def _drawn_again(stay: float) -> float:
    """The probability to be drawn nevertheless, if `kept` stay: 2 - kept draws among 8 - kept."""
    return (1 - stay) * 2 / 8 + stay * 1 / 7


def test_scaling_counts_resident_and_offloaded_layers(published):
    from contestants import Task
    from dequantized import dense_bytes_16bit
    from rivals import scaled

    source = open_checkpoint(published)  # 3 layers
    layer_bytes = 8 * 2 * sum(n * k for n, k in source.layout.shapes.values())
    ram = dense_bytes_16bit(source) + layer_bytes + 1  # room for one of them
    task = Task(str(published), **TASK | {"ram": ram, "scaled_layers": 2})
    found = scaled(task, source, [10.0, 6.0, 7.0], [[1.0, 3.0], [1.0, 2.0], [1.0, 4.0]])
    assert found["resident_layers"] == 1
    assert found["first_token_s"] == 10 - 4 + 1 + 2 * 3
    assert found["seconds_per_token"] == [6 - 3 + 1 + 2 * 2, 7 - 5 + 1 + 2 * 4]
    assert found["offloaded_bytes"] == 2 * layer_bytes


def test_predictions_are_right_as_often_as_stated():
    from types import SimpleNamespace

    from forced_routing import ForcedPredictions, sticky_experts

    experts = torch.from_numpy(sticky_experts(3000, 2, 8, 2, 0.0).astype(np.int64)).transpose(0, 1)
    routing = SimpleNamespace(experts=experts, position={0: 5, 1: 5})
    predictor = ForcedPredictions(routing, 8, recall=0.7)
    logits = predictor(torch.zeros(2995, 4), [SimpleNamespace(number=0), SimpleNamespace(number=1)])
    predicted = logits.topk(2).indices
    right = (predicted.unsqueeze(-1) == experts[:, 5:].unsqueeze(-2)).any(-2).float().mean()
    assert right == pytest.approx(0.7, abs=0.02)


def test_startup_names_its_parts(tmp_path):
    ended = run("startup.py", "--repeats", 1, "--out", tmp_path / "startup.json")
    assert ended.returncode == 0, ended.stderr
    found = json.loads((tmp_path / "startup.json").read_text())
    assert [*found["seconds"]] == ["import", "skeleton", "dense part", "experts", "the rest", "first token"]
    assert all(seconds > 0 for seconds in found["seconds"].values())
    assert found["over_read"] * found["read_s"] == pytest.approx(
        found["total_s"] - found["seconds"]["import"]
    )


@pytest.mark.both_products
def test_passes_are_compared_on_the_same_logits(offloaded):
    from packed_vs_transformers import DEQUANTIZED, PACKED, compare_passes

    packed, dequantized = offloaded(cache_size=8), offloaded(dequantize_on_load=True)
    requests = workload(load_tokenizer(), 6, lengths=(2, 4, 9))
    found = compare_passes(packed, dequantized, requests, (1, 3), repeats=2, context=8)
    assert set(found.seconds[3]) == {PACKED, DEQUANTIZED, "eager", "batched_mm", "grouped_mm"}
    assert all(len(of) == 2 * 3 for of in found.seconds[3].values())
    assert max(found.difference.values()) < limit(1e-4, 5e-2)
    assert found.over_best(PACKED, 3) > 0
    with pytest.raises(OptionError, match="cannot be compared"):
        compare_passes(offloaded(cache_size=3), dequantized, requests)


def test_the_plain_model_is_transformers_own_with_our_weights(offloaded):
    from packed_vs_transformers import plain_model

    model = offloaded(cache_size=3, batch_size=4)
    plain = plain_model(model)
    assert type(plain) is type(model) and not hasattr(plain, "offload")
    assert all(not parameter.is_meta for parameter in plain.parameters())


def test_fullsize_in_the_shape_of_qwen3(tmp_path):
    arguments = ["--family", "qwen3_moe", "--bits", 4, "--ram", "200MB", "--prompt", 5, "--tokens", 4]
    found = fullsize(tmp_path, *arguments, "--rivals", "accelerate")["contestants"]
    assert len(found["ours"]["seconds_per_token"]) == 4
    assert found["ours"]["run"]["n_experts"] == 128
    assert "knows Mixtral only" in found["accelerate"]["missing"]


def test_parameters_of_the_shapes():
    from shapes import CONFIGS, Shape

    count = {family: Shape.of(make()).n_parameters / 1e9 for family, make in CONFIGS.items()}
    assert count == {"mixtral": pytest.approx(46.7, abs=0.01), "qwen3_moe": pytest.approx(30.53, abs=0.01)}


@pytest.mark.parametrize(
    "program", sorted(path.name for path in BENCHMARKS.glob("*.py") if "RESULTS /" in path.read_text())
)
def test_results_say_where_they_were_measured(program):
    """A figure of one kind of processor is not a figure of another."""
    text = (BENCHMARKS / program).read_text()
    assert program == "readme.py" or ("machine(" in text and "platform.machine" not in text)
