"""save_pretrained writes a whole model, or refuses; transformers refuses what it has written."""

import gc
import json
import os
import shutil
import warnings
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from mixtral_offload import from_pretrained, load_tokenizer
from mixtral_offload.errors import OptionError
from mixtral_offload.models.checkpoint import INDEX
from mixtral_offload.runtime.verify import verify
from mixtral_offload.weights.source import DEMO

IDS = torch.tensor([[300, 700, 900, 5, 6]])


@torch.no_grad()
def logits(model):
    return model(IDS).logits


@pytest.mark.parametrize("source", [DEMO, DEMO.parent / "fp16", "published"])
@pytest.mark.parametrize("store", ["ram", "disk"])
def test_a_saved_model_is_the_same(offloaded, tmp_path, source, store, published):
    model = offloaded(published if source == "published" else source, cache_size=3, store=store)
    expected = model(IDS % 90).logits
    model.save_pretrained(tmp_path / "saved")
    again = offloaded(tmp_path / "saved", cache_size=2)
    assert torch.equal(again(IDS % 90).logits, expected)
    assert again.offload.layout == model.offload.layout
    assert verify(tmp_path / "saved").by_checksum
    if source == DEMO:
        load_tokenizer(tmp_path / "saved")
        with pytest.raises(ValueError, match=r"mixtral_offload\.from_pretrained"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
        size = sum(path.stat().st_size for path in (tmp_path / "saved").glob("*.safetensors"))
        assert size <= 1.01 * sum(path.stat().st_size for path in DEMO.glob("*.safetensors"))


def test_what_was_trained_is_saved(offloaded, tmp_path):
    model = offloaded(cache_size=3)
    norm = model.get_parameter("model.layers.3.post_attention_layernorm.weight").requires_grad_()
    optimizer = torch.optim.SGD([norm], lr=1e-3)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    model.save_pretrained(tmp_path / "saved")
    model.save_pretrained(tmp_path / "saved")  # a second checkpoint takes the first one's place
    again = offloaded(tmp_path / "saved", cache_size=2)
    assert torch.equal(again.get_parameter("model.layers.3.post_attention_layernorm.weight"), norm)
    assert torch.equal(logits(again), logits(model))
    assert not torch.equal(logits(again), logits(offloaded(cache_size=2)))


def test_the_hubs_upload_gets_the_same_files(offloaded, tmp_path, monkeypatch):
    model, seen = offloaded(cache_size=3), {}

    def upload(self, working_dir, *args, **kwargs):
        seen["files"] = sorted(os.listdir(working_dir))

    api = SimpleNamespace(create_repo=lambda *args, **kwargs: SimpleNamespace(repo_id="a/b"))
    hub = "transformers.utils.hub"
    monkeypatch.setattr(f"{hub}.PushToHubMixin._upload_modified_files", upload)
    monkeypatch.setattr(f"{hub}.hf_api", lambda: api, raising=False)
    monkeypatch.setattr(f"{hub}.create_repo", api.create_repo, raising=False)  # of transformers 5.15
    monkeypatch.setattr(
        f"{hub}.create_and_tag_model_card", lambda *args, **kwargs: SimpleNamespace(save=lambda path: None)
    )
    model.push_to_hub("a/b")
    model.save_pretrained(tmp_path / "saved")
    assert set(seen["files"]) >= {path.name for path in (tmp_path / "saved").glob("model*")} | {
        INDEX,
        "config.json",
    }


def test_what_cannot_be_saved_is_refused(offloaded, tmp_path):
    model = offloaded(cache_size=3)
    for arguments, match in (
        ({"save_directory": DEMO}, "reads its experts from"),
        ({"save_directory": tmp_path / "x", "variant": "fp16"}, "variant"),
        ({"save_directory": tmp_path / "x", "safe_serialization": False}, "safe_serialization"),
        ({"save_directory": tmp_path / "x", "push_to_hub": True}, "push_to_hub"),
    ):  # fmt: skip
        with pytest.raises(OptionError, match=match):
            model.save_pretrained(**arguments)
    model.save_pretrained(tmp_path / "x", is_main_process=False)
    assert not (tmp_path / "x").exists()
    model.model.norm.register_parameter("adapter", torch.nn.Parameter(torch.zeros(3)))
    with pytest.raises(OptionError, match=r"model\.norm\.adapter"):
        model.save_pretrained(tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_the_base_model_is_saved_as_the_whole(offloaded, tmp_path):
    """transformers would write it without its experts; a base model's own names are without the prefix."""
    model = offloaded(cache_size=3)
    expected = logits(model)
    model.model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(offloaded(tmp_path / "saved", cache_size=2)), expected)
    given = {"norm.weight": model.model.norm.weight * 2}
    model.model.save_pretrained(tmp_path / "given", state_dict=given)
    again = offloaded(tmp_path / "given", cache_size=2)
    assert torch.equal(again.model.norm.weight, model.model.norm.weight * 2)
    alone = from_pretrained(cache_size=2, device="cpu").model
    gc.collect()
    with pytest.raises(OptionError, match="has been freed"):
        alone.save_pretrained(tmp_path / "alone")
    alone(IDS)


def test_state_dict_says_once_what_it_lacks(offloaded):
    model = offloaded(cache_size=3)
    with pytest.warns(UserWarning, match="holds no experts"):
        state = model.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert state.keys() == model.state_dict().keys()
    model.load_state_dict(state)


def test_a_dequantized_model_is_saved_as_transformers_does(offloaded, tmp_path):
    model = offloaded(dequantize_on_load=True)
    model.save_pretrained(tmp_path / "saved")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    with torch.no_grad():
        assert (plain(IDS).logits - logits(model)).abs().max() < 1e-4
    assert (logits(offloaded(tmp_path / "saved", cache_size=2)) - logits(model)).abs().max() < 1e-4
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())


def test_a_dropped_model_is_freed_at_once():
    import weakref

    model = from_pretrained(device="cpu", cache_size=2)
    weak = weakref.ref(model.offload.cache)
    del model
    assert weak() is None


def test_experts_of_files_that_have_changed_are_not_saved(offloaded, tmp_path):
    folder = shutil.copytree(DEMO, tmp_path / "a")
    model = offloaded(folder, cache_size=2, store="ram")
    path = sorted(folder.glob("model*.safetensors"))[0]
    shutil.copy(path, tmp_path / "new")
    os.replace(tmp_path / "new", path)
    with pytest.raises(OptionError, match="have changed since"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_changes_of_the_configuration_are_saved(offloaded, tmp_path):
    """As transformers' own method does: what was changed after loading, and nothing else."""
    model = offloaded(cache_size=3)
    model.save_pretrained(tmp_path / "as it was")
    model.config.sliding_window, model.config.num_experts_per_tok, model.config.my_note = 3, 1, "kept"
    model.save_pretrained(tmp_path / "saved")
    before, after = (
        json.loads((tmp_path / name / "config.json").read_text()) for name in ("as it was", "saved")
    )
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert changed == {"sliding_window", "num_experts_per_tok", "my_note"}
    again = offloaded(tmp_path / "saved", cache_size=3)
    assert (again.config.sliding_window, again.config.num_experts_per_tok, again.config.my_note) == (
        3,
        1,
        "kept",
    )
    assert not torch.equal(logits(again), logits(offloaded(cache_size=3)))
    verify(tmp_path / "saved")


@pytest.mark.parametrize(
    "change",
    [{"hidden_size": 96}, {"num_local_experts": 4}, {"num_hidden_layers": 2}, {"vocab_size": 7},
     {"num_hidden_layers": -1}, {"num_experts_per_tok": 99}],
)  # fmt: skip
def test_changes_that_the_weights_do_not_fit_are_refused(offloaded, tmp_path, change):
    model = offloaded(cache_size=3)
    for name, value in change.items():
        setattr(model.config, name, value)
    with pytest.raises(OptionError, match="another model"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("part", ["layer", "mlp", "experts"])
def test_a_model_whose_layers_were_moved_is_refused(offloaded, tmp_path, part):
    """Its experts would be saved at their old places."""
    model = offloaded(cache_size=3)
    layers = model.model.layers
    if part == "layer":
        layers[0], layers[1] = layers[1], layers[0]
    elif part == "mlp":
        layers[0].mlp, layers[1].mlp = layers[1].mlp, layers[0].mlp
    else:
        layers[0].mlp.experts = layers[1].mlp.experts
    with pytest.raises(OptionError, match="not where its checkpoint has them"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize(
    "name, change, match",
    [
        ("model.layers.0.mlp.experts.gate_up_proj", lambda model: torch.zeros(8, 2, 2), "would not be saved"),
        ("base_model.model.lm_head.weight", lambda model: model.lm_head.weight * 2, "would not be saved"),
        ("lm_head.weight", lambda model: model.lm_head.weight.T, "another kind"),
        ("lm_head.weight", lambda model: model.lm_head.weight.int(), "another kind"),
    ],
)
def test_values_that_cannot_be_followed_are_refused(offloaded, tmp_path, name, change, match):
    """They were left out, or reshaped, in silence."""
    model = offloaded(cache_size=3)
    with torch.no_grad(), pytest.raises(OptionError, match=match):
        model.save_pretrained(tmp_path / "x", state_dict={name: change(model)})
    assert not (tmp_path / "x").exists()


def test_values_of_a_quantized_layer_are_followed(offloaded, tmp_path):
    model = offloaded(cache_size=3)
    name = "model.layers.0.self_attn.q_proj"
    state = {of: tensor.clone() for of, tensor in model.state_dict().items()}
    (packed,) = (of for of in state if of.startswith(name) and of.endswith("W_q"))
    state[packed].zero_()
    model.save_pretrained(tmp_path / "saved", state_dict=state)
    found = logits(offloaded(tmp_path / "saved", cache_size=2))
    model.load_state_dict(state)
    assert torch.equal(found, logits(model))


def test_a_generation_config_that_json_cannot_hold(offloaded, tmp_path):
    model = offloaded(cache_size=3)
    model.generation_config.odd = torch.Generator()
    with pytest.raises(OptionError, match="generation_config"):
        model.save_pretrained(tmp_path / "x")
