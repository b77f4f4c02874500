"""What only a CUDA device can show. Skipped where there is none."""

import pytest
import torch

from mixtral_offload import ChatSession
from mixtral_offload.generation.tokenizer import load_tokenizer
from mixtral_offload.runtime.cache import ExpertCache
from mixtral_offload.runtime.engines import StreamEngine, ThreadEngine
from mixtral_offload.weights.source import DEMO
from tests.runtime.test_cache import LAYOUT, N_EXPERTS, FakeStore, serve

pytestmark = pytest.mark.gpu
IDS = torch.arange(3, 60).unsqueeze(0)


@pytest.fixture(params=[torch.float16, torch.float32])
def dtype(request):
    return request.param


@torch.no_grad()
def test_every_cache_size_and_store_gives_the_same_bits(offloaded, dtype):
    resident = offloaded(DEMO, device="cuda", cache_size=8, dtype=dtype)
    wanted = resident(IDS.cuda()).logits
    tokens = resident.generate(IDS.cuda(), max_new_tokens=64, min_new_tokens=64, do_sample=False)
    for cache_size in range(2, 8):
        for store in ("ram", "disk"):
            model = offloaded(DEMO, device="cuda", cache_size=cache_size, store=store, dtype=dtype)
            assert torch.equal(model(IDS.cuda()).logits, wanted)
            assert torch.equal(
                model.generate(IDS.cuda(), max_new_tokens=64, min_new_tokens=64, do_sample=False), tokens
            )


def test_the_slab_is_pinned_and_copies_use_a_stream(offloaded):
    model = offloaded(DEMO, device="cuda", cache_size=2, store="ram")
    assert model.offload.cache.store._slab.is_pinned()
    assert isinstance(model.offload.cache.engine, StreamEngine)
    model = offloaded(DEMO, device="cuda", cache_size=2, store="disk")
    assert isinstance(model.offload.cache.engine, ThreadEngine)


def test_memory_that_cannot_be_pinned_is_used_with_one_warning(offloaded, monkeypatch):
    monkeypatch.setattr(
        torch.cuda, "cudart", lambda: type("Refuses", (), {"cudaHostRegister": staticmethod(lambda *a: 2)})
    )
    with pytest.warns(UserWarning, match="cannot pin") as caught:
        model = offloaded(DEMO, device="cuda", cache_size=2, store="ram")
    assert len([w for w in caught if "cannot pin" in str(w.message)]) == 1
    monkeypatch.undo()
    assert model.generate(IDS.cuda(), max_new_tokens=4).shape[1] > IDS.shape[1]


@torch.no_grad()
def test_published_format_in_fp32(offloaded, published, expected):
    model = offloaded(published, device="cuda", dtype="float32", cache_size=2)
    assert (model(expected["input_ids"].cuda()).logits.cpu() - expected["logits"]).abs().max() < 1e-3


@pytest.mark.parametrize("kind", ["stream", "thread"])
def test_no_expert_is_read_before_it_has_arrived_in_1000_steps(kind):
    """Copies that are late: the copy stream sleeps before each, the reader must wait on the device."""
    device = torch.device("cuda")
    engine = (
        StreamEngine(device, LAYOUT.n_bytes) if kind == "stream" else ThreadEngine(device, LAYOUT.n_bytes)
    )
    start = engine.start

    def late(copy):
        if kind == "stream":
            with torch.cuda.stream(engine._stream):
                torch.cuda._sleep(200_000)
        start(copy)

    engine.start = late
    cache = ExpertCache(LAYOUT, {0: (3, ())}, FakeStore(), engine, device)
    generator = torch.Generator().manual_seed(0)
    for _ in range(1000):
        serve(cache, 0, torch.randperm(N_EXPERTS, generator=generator)[:2].tolist())
    cache.close()


def test_another_device_by_its_index(offloaded):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    model = offloaded(DEMO, device="cuda:1", cache_size=2)
    assert model.generate(IDS.to("cuda:1"), max_new_tokens=4).device.index == 1


def test_chat(offloaded):
    session = ChatSession(offloaded(DEMO, device="cuda", cache_size=2), load_tokenizer(DEMO))
    assert "Paris" in "".join(session.send("What is the capital of France?"))
