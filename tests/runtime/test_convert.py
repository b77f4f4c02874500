"""`convert`: refuses before any work, resumes after a kill, checks itself, keeps two processes apart."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from mixtral_offload import convert_checkpoint, from_pretrained
from mixtral_offload.apps.cli import main
from mixtral_offload.errors import CheckpointError
from mixtral_offload.models.checkpoint import INDEX
from mixtral_offload.runtime import convert
from mixtral_offload.weights import work_folder
from mixtral_offload.weights.checksums import stated
from mixtral_offload.weights.hqq import PAPER, Quantization
from mixtral_offload.weights.source import DEMO
from mixtral_offload.weights.work_folder import JOURNAL, work_folder_of

PLAIN = DEMO.parent / "fp16"
WIDTHS = Quantization(4, 64), Quantization(8, 64)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return contents(convert_checkpoint(PLAIN, tmp_path_factory.mktemp("whole") / "target", *WIDTHS))


class Stop(BaseException):
    """Ends a conversion as a kill would, but for what Python still cleans up."""


def stop_after(n_experts):
    left = iter(range(n_experts))

    def progress(n):
        if next(left, None) is None:
            raise Stop

    return progress


def interrupted(target, n_experts, source=PLAIN, widths=WIDTHS, **options):
    with pytest.raises(Stop):
        convert_checkpoint(source, target, *widths, progress=stop_after(n_experts), **options)
    return work_folder_of(target)


# before any work


def tiny(folder, model_type, **change):
    """A random model of a family, as its makers would publish it in 16 bits."""
    sizes = {
        "vocab_size": 96, "hidden_size": 64, "intermediate_size": 32, "moe_intermediate_size": 32,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    config = AutoConfig.for_model(model_type)
    known = set(config.to_dict()) | set(config.attribute_map)
    config = type(config)(**{name: value for name, value in sizes.items() if name in known}, **change)
    AutoModelForCausalLM.from_config(config).half().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "hy_v3", "laguna", "mimo_v2_flash", "flint"])
def test_convert_refuses_at_once_what_could_not_be_loaded_afterwards(tmp_path, monkeypatch, model_type):
    """Several families were converted and could not be loaded: both accept a family, or both refuse it."""
    try:
        source = tiny(tmp_path / "source", model_type)
    except Exception as error:
        pytest.skip(f"this transformers makes no {model_type} of these sizes: {type(error).__name__}")
    try:
        from_pretrained(source, device="cpu").offload.cache.close()
    except CheckpointError as error:
        monkeypatch.setattr(convert, "expert_tensors", lambda *of: pytest.fail("work was begun"))
        with pytest.raises(CheckpointError) as caught:
            convert_checkpoint(source, tmp_path / "target", *WIDTHS)
        assert str(caught.value).splitlines()[0] == str(error).splitlines()[0]
        assert not list(tmp_path.glob("target*"))
        return
    target = convert_checkpoint(source, tmp_path / "target", *WIDTHS)
    from_pretrained(target, device="cpu").offload.cache.close()


@pytest.mark.parametrize(
    "fault", ["a key too much", "a norm of another size", "a norm missing", "odd config"]
)
def test_faults_of_the_source_are_found_before_any_work(tmp_path, monkeypatch, fault):
    source = tmp_path / "source"
    source.mkdir()
    tensors, config = load_file(PLAIN / "model.safetensors"), json.loads((PLAIN / "config.json").read_text())
    norm = "model.layers.5.input_layernorm.weight"
    if fault == "a key too much":
        tensors["model.layers.5.strange.weight"] = torch.ones(3).half()
    elif fault == "a norm of another size":
        tensors[norm] = torch.ones(3).half()
    elif fault == "a norm missing":
        tensors.pop(norm)
    else:
        config["hidden_act"] = "no such function"
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    (source / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(convert, "_write_weights", lambda *of: pytest.fail("work was begun"))
    with pytest.raises(CheckpointError):
        convert_checkpoint(source, tmp_path / "target")
    assert not list(tmp_path.glob("target*"))


# interrupted


@pytest.mark.parametrize("n_experts", [1, 20, 47])
def test_an_interrupted_conversion_is_gone_on_with(tmp_path, undisturbed, monkeypatch, n_experts):
    target, made, said = tmp_path / "target", [], []
    folder = interrupted(target, n_experts)
    assert not target.exists() and len(list(folder.glob("model-*"))) == n_experts + 1
    real = convert.expert_tensors
    monkeypatch.setattr(convert, "expert_tensors", lambda *of: made.append(of[1]) or real(*of))
    convert_checkpoint(PLAIN, target, *WIDTHS, report=said.append)
    assert len(made) == 48 - n_experts - 1 and f"resuming: {n_experts + 1} files" in said[0]
    assert contents(target) == undisturbed and os.listdir(tmp_path) == ["target"]


def test_twice_interrupted_and_at_the_very_end(tmp_path, undisturbed, monkeypatch):
    target = tmp_path / "target"
    interrupted(target, 5)
    interrupted(target, 30)
    for name in ("write_new", "_check_after"):
        with monkeypatch.context() as patch, pytest.raises(Stop):
            patch.setattr(convert, name, lambda *of: (_ for _ in ()).throw(Stop))
            convert_checkpoint(PLAIN, target, *WIDTHS)
    assert contents(convert_checkpoint(PLAIN, target, *WIDTHS)) == undisturbed


DAMAGE = {
    "a bit": lambda path: path.write_bytes(path.read_bytes()[:-5] + b"\x55" + path.read_bytes()[-4:]),
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "empty": lambda path: path.write_bytes(b""),
    "gone": lambda path: path.unlink(),
    "a link": lambda path: (
        path.rename(path.parent.parent / "moved"),
        path.symlink_to(path.parent.parent / "moved"),
    ),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_finished_file_that_is_no_longer_right_is_made_again(tmp_path, undisturbed, damage):
    folder = interrupted(tmp_path / "target", 9)
    damage(folder / "model-00004-of-00049.safetensors")
    said = []
    assert (
        contents(convert_checkpoint(PLAIN, tmp_path / "target", *WIDTHS, report=said.append)) == undisturbed
    )
    assert "resuming: 9 files" in said[0]


@pytest.mark.parametrize("text", ["", "{", '{"format": "other"}\n', "[]\n[]\n"])
def test_a_journal_that_is_not_ours_keeps_the_folder(tmp_path, text):
    folder = interrupted(tmp_path / "target", 3)
    (folder / JOURNAL).write_text(text)
    before = contents(folder)
    with pytest.raises(CheckpointError, match="in the way"):
        convert_checkpoint(PLAIN, tmp_path / "target", *WIDTHS)
    assert contents(folder) == before


def test_a_journal_that_ends_within_a_line(tmp_path, undisturbed):
    folder = interrupted(tmp_path / "target", 9)
    data = (folder / JOURNAL).read_bytes()
    (folder / JOURNAL).write_bytes(data[:-10])
    assert contents(convert_checkpoint(PLAIN, tmp_path / "target", *WIDTHS)) == undisturbed


@pytest.mark.parametrize("change", ["widths", "source", "config_extra"])
def test_other_settings_begin_anew(tmp_path, undisturbed, change):
    source = tmp_path / "source"
    source.mkdir()
    for path in PLAIN.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    other = {
        "widths": {"widths": (PAPER[8], PAPER[8])},
        "config_extra": {"config_extra": {"offload": {"cache_size": 3}}},
    }
    interrupted(tmp_path / "target", 9, source, **other.get(change, {}))
    if change == "source":
        os.utime(source / "model.safetensors", (1, 1))
    said = []
    assert (
        contents(convert_checkpoint(source, tmp_path / "target", *WIDTHS, report=said.append)) == undisturbed
    )
    assert "other settings" in said[0]


def test_a_fault_of_the_source_leaves_nothing(tmp_path):
    """Going on would end at the same place."""
    source = tmp_path / "source"
    source.mkdir()
    tensors = load_file(PLAIN / "model.safetensors")
    tensors["model.layers.3.block_sparse_moe.experts.1.w2.weight"][0, 0] = torch.inf
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    (source / "config.json").write_bytes((PLAIN / "config.json").read_bytes())
    for widths in ((None, None), WIDTHS):
        with pytest.raises(CheckpointError, match="not finite"):
            convert_checkpoint(source, tmp_path / "target", *widths)
        assert os.listdir(tmp_path) == ["source"]


# processes


def start(target, *options, **kwargs):
    """The command in a process of its own, slowed down so that a signal meets it at work."""
    code = (
        "import sys, time; from mixtral_offload.runtime import convert; real = convert.expert_tensors\n"
        "convert.expert_tensors = lambda *of: (time.sleep(.1), real(*of))[1]\n"
        "from mixtral_offload.apps.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "convert", str(PLAIN), str(target), *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=Path(__file__).parents[2], **pipes, **kwargs)


def wait_for(target, n_files, process):
    for _ in range(600):
        if len(list(work_folder_of(target).glob("model-*"))) >= n_files or process.poll() is not None:
            break
        time.sleep(0.1)
    assert process.poll() is None, process.communicate()


OPTIONS = "--bits", "4", "--attention-bits", "8"


@pytest.mark.parametrize("number, status", [("SIGTERM", 143), ("SIGINT", 130), ("SIGKILL", -9)])
def test_a_signal_leaves_what_the_same_command_goes_on_with(tmp_path, undisturbed, number, status, capsys):
    target = tmp_path / "target"
    process = start(target, *OPTIONS)
    wait_for(target, 3, process)
    process.send_signal(getattr(signal, number))
    error = process.communicate(timeout=60)[1]
    assert process.returncode == status and not target.exists(), error
    if number != "SIGKILL":
        assert "finished files are kept in" in error and str(work_folder_of(target)) in error
        assert "the same command resumes" in error and "Traceback" not in error
    assert main(["convert", str(PLAIN), str(target), *OPTIONS]) == 0
    said = capsys.readouterr()
    assert "resuming:" in said.err and "checked:" in said.err and "written:" in said.out
    assert contents(target) == undisturbed and os.listdir(tmp_path) == ["target"]


def test_two_processes_for_one_target(tmp_path, undisturbed):
    target = tmp_path / "target"
    process = start(target, *OPTIONS)
    wait_for(target, 2, process)
    with pytest.raises(CheckpointError, match="another process is converting to this target"):
        convert_checkpoint(PLAIN, target, *WIDTHS)
    assert process.wait(60) == 0
    assert contents(target) == undisturbed
    with pytest.raises(CheckpointError, match="target exists"):
        convert_checkpoint(PLAIN, target, *WIDTHS)


def test_the_other_process_finishes_in_between(tmp_path, monkeypatch):
    """Between our look at the target and our lock."""
    target, real = tmp_path / "target", work_folder.own_folder

    def late(path):
        monkeypatch.undo()
        convert_checkpoint(PLAIN, target, *WIDTHS)
        real(path)

    monkeypatch.setattr(work_folder, "own_folder", late)
    with pytest.raises(CheckpointError, match="target exists"):
        convert_checkpoint(PLAIN, target, *WIDTHS)
    assert os.listdir(tmp_path) == ["target"]


# the check at the end


def test_what_was_written_wrong_is_never_given_its_name(tmp_path, undisturbed, monkeypatch):
    real = convert.write_new

    def write_and_spoil(path, data):
        real(path, data)
        file = path.parent / "model-00007-of-00049.safetensors"
        file.write_bytes(file.read_bytes()[:-1] + b"\x00")

    monkeypatch.setattr(convert, "write_new", write_and_spoil)
    with pytest.raises(CheckpointError, match=r"cannot be read again(?s:.*)model-00007"):
        convert_checkpoint(PLAIN, tmp_path / "target", *WIDTHS)
    assert os.listdir(tmp_path) == ["target.converting"]
    monkeypatch.undo()
    said = []
    convert_checkpoint(PLAIN, tmp_path / "target", *WIDTHS, report=said.append)
    assert "resuming: 48 files" in said[0]
    assert contents(tmp_path / "target") == undisturbed


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_small_file_that_was_written_wrong(tmp_path, monkeypatch, name):
    real = convert.write_new

    def spoil(path, data):
        real(path, data.replace("{", "{ ", 1) if path.name == name and isinstance(data, str) else data)
        if path.name == name and isinstance(data, bytes):
            path.write_bytes(data[:-1])

    monkeypatch.setattr(convert, "write_new", spoil)
    with pytest.raises(CheckpointError, match=f"cannot be read again(?s:.*){name}"):
        convert_checkpoint(DEMO, tmp_path / "target")


def test_each_file_has_a_checksum(tmp_path, undisturbed, published):
    names = {name for name in undisturbed if name.startswith("model-")}
    assert json.loads(undisturbed[INDEX])["metadata"]["checksums"]["files"].keys() == names
    target = convert_checkpoint(published, tmp_path / "kept")
    assert len(stated(target / INDEX)) == 25


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="needs limits on file sizes")
def test_a_full_disk_says_what_is_kept(tmp_path, undisturbed):
    """The dense part is larger than an expert."""
    import resource

    target, limits = tmp_path / "target", resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"cannot write(?s:.*)48 finished files are kept"):
            convert_checkpoint(PLAIN, target, *WIDTHS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert contents(convert_checkpoint(PLAIN, target, *WIDTHS)) == undisturbed
