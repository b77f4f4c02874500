"""Arguments of transformers' own `from_pretrained`: understood, or refused with what to do instead."""

import pytest
import torch

from mixtral_offload import from_pretrained
from mixtral_offload.errors import DownloadError, OptionError
from mixtral_offload.runtime.arguments import HUB, OTHERS, split_arguments
from mixtral_offload.runtime.memory import memory_use
from mixtral_offload.runtime.options import DTYPES
from mixtral_offload.weights.hub import download
from tests.twin import limit

HARMLESS = {
    "trust_remote_code": False, "low_cpu_mem_usage": True, "use_safetensors": True,
    "output_loading_info": False, "ignore_mismatched_sizes": False, "load_in_4bit": False,
    "load_in_8bit": None, "quantization_config": None, "max_memory": None, "config": None,
    "torch_dtype": None, "device_map": None, "token": None, "revision": None, "subfolder": "",
    "variant": None,
}  # fmt: skip


def test_what_changes_nothing_is_accepted():
    assert split_arguments(HARMLESS, None) == ({}, {})
    model = from_pretrained(
        device="cpu", cache_size=2, ram="1GB", **HARMLESS
    )  # what is free changes by itself
    assert model.dtype == torch.float32
    assert memory_use(device="cpu", cache_size=2, ram="1GB", **HARMLESS).plan == model.offload.plan


@pytest.mark.parametrize(
    "given, hint",
    [({"load_in_4bit": True}, "mixtral-offload convert"),
     ({"quantization_config": object()}, "mixtral-offload convert"),
     ({"trust_remote_code": True}, "leave it out"), ({"max_memory": {0: "10GB"}}, "vram="),
     ({"config": object()}, "config.json"), ({"offload_folder": "x"}, 'store="disk"'),
     ({"use_auth_token": "x"}, "token"), ({"ignore_mismatched_sizes": True}, "error"),
     ({"use_safetensors": False}, "safetensors"),
     ({"device_map": {"model.layers.0": 0, "lm_head": "cpu"}}, "vram="), ({"device_map": {}}, "vram="),
     ({"device_map": 3.5}, "vram=")],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_with_a_hint(given, hint):
    for function in (from_pretrained, memory_use):
        with pytest.raises(OptionError) as caught:
            function(device="cpu", **given)
        assert hint in str(caught.value).split("next step: ")[1]


def test_every_argument_of_transformers_is_known():
    """Those of its signature's documentation, one by one: none is an unknown option."""
    names = set(OTHERS) | set(HUB) | {"torch_dtype", "dtype", "device_map", "attn_implementation"}
    documented = {
        "config", "cache_dir", "ignore_mismatched_sizes", "force_download", "local_files_only", "token",
        "revision", "use_safetensors", "weights_only", "state_dict", "proxies", "output_loading_info",
        "attn_implementation", "experts_implementation", "dtype", "device_map", "max_memory", "tp_plan",
        "tp_size", "device_mesh", "distributed_config", "offload_folder", "offload_buffers",
        "quantization_config", "subfolder", "variant", "key_mapping", "trust_remote_code", "adapter_kwargs",
        "gguf_file", "generation_config", "use_kernels", "kernel_config", "low_cpu_mem_usage", "load_in_4bit",
        "load_in_8bit", "offload_state_dict",
    }  # fmt: skip
    assert documented <= names
    for name in documented & set(OTHERS):
        with pytest.raises(OptionError, match=f"{name} is not supported"):
            split_arguments({name: object()}, None)


@pytest.mark.parametrize(
    "device_map", ["cpu", {"": "cpu"}, torch.device("cpu"), {"a": "cpu", "b": "cpu"}, "auto"]
)
def test_one_device(device_map):
    options, _ = split_arguments({"device_map": device_map}, None)
    assert options == ({} if device_map == "auto" else {"device": "cpu"})
    assert from_pretrained(cache_size=2, device_map=device_map).device.type in ("cpu", "cuda")


def test_a_number_is_a_card():
    for device_map in (1, {"": 1}, "cuda:1"):
        assert split_arguments({"device_map": device_map}, None)[0] == {"device": "cuda:1"}


def test_dtypes_by_both_names():
    for dtype in (torch.bfloat16, "bfloat16", "torch.bfloat16"):
        for name in ("dtype", "torch_dtype"):
            assert from_pretrained(device="cpu", cache_size=2, **{name: dtype}).dtype == torch.bfloat16
    auto = from_pretrained(device="cpu", cache_size=2, torch_dtype="auto")
    assert auto.dtype == torch.float16, "the shipped checkpoint's own"
    assert auto.offload.options.dtype in DTYPES
    both = split_arguments({"dtype": torch.bfloat16, "torch_dtype": "bfloat16"}, None)[0]
    assert both == {"dtype": "bfloat16"}
    with pytest.raises(OptionError, match="two values for dtype"):
        from_pretrained(dtype="float32", torch_dtype="float16")
    with pytest.raises(OptionError, match="unknown dtype"):
        from_pretrained(torch_dtype="int8")


@pytest.mark.both_products
@torch.no_grad()
def test_attention():
    ids = torch.tensor([[1, 5, 9, 30, 7, 100, 3]])
    eager, sdpa = (
        from_pretrained(device="cpu", cache_size=2, attn_implementation=name) for name in ("eager", "sdpa")
    )
    assert (eager.config._attn_implementation, sdpa.config._attn_implementation) == ("eager", "sdpa")
    assert (eager(ids).logits - sdpa(ids).logits).abs().max() < limit(1e-4, 1e-2)
    assert eager(ids, output_attentions=True).attentions[0].shape == (1, 6, 7, 7)
    for name in ("no_such_attention", 3, ""):
        with pytest.raises(OptionError, match="attn_implementation"):
            from_pretrained(device="cpu", attn_implementation=name)


def test_arguments_of_the_download():
    given = {"token": "abc", "revision": "v1", "cache_dir": "/some/where", "local_files_only": True}
    assert split_arguments(given, {"endpoint": "http://x"}) == ({}, given | {"endpoint": "http://x"})
    assert split_arguments({"revision": "v1"}, {"revision": "v1"}) == ({}, {"revision": "v1"})
    with pytest.raises(OptionError) as caught:
        split_arguments({"token": "secret-1"}, {"token": "secret-2"})
    assert "two values for token" in str(caught.value) and "secret" not in str(caught.value)


def test_local_files_only_asks_no_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "mixtral_offload.weights.hub.HfApi", lambda *_, **__: pytest.fail("the hub was asked")
    )
    with pytest.raises(DownloadError, match="local_files_only"):
        from_pretrained("owner/name", cache_dir=tmp_path, local_files_only=True)
    with pytest.raises(DownloadError, match="local_files_only"):
        download("owner/name", cache_dir=tmp_path, local_files_only=True)
