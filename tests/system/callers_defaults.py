"""Print what a program gets whose default type and device for new tensors are not torch's own.

`python -m tests.system.callers_defaults float16 cpu`; a process of its own, because a buffer of the wrong
type may end it.
"""

import hashlib
import json
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from mixtral_offload import (
    ChatSession,
    GenerationRequest,
    OptionError,
    Quantization,
    RoutingTrace,
    convert_checkpoint,
    from_pretrained,
    generate_batch,
    load_tokenizer,
    record,
)
from mixtral_offload.weights.source import DEMO

MODELS: dict[str, dict[str, Any]] = {
    "exact": {},
    "fast": {"precision": "fast"},
    "on the CPU": {"misses": "cpu"},
    "in bfloat16": {"dtype": torch.bfloat16},
    "dequantized": {"dequantize_on_load": True, "cache_size": 8},
}


def _digest(parts: Iterable[bytes]) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def _of_files(folder: Path, pattern: str) -> str:
    return _digest(path.read_bytes() for path in sorted(folder.glob(pattern)))


def answers(folder: Path) -> dict[str, object]:
    """What a caller can ask for; tensors and files as digests."""
    tokenizer, found = load_tokenizer(), {}
    ids = torch.tensor([[300, 700, 900, 12, 5]], device="cpu")
    for name, options in MODELS.items():
        try:
            model = from_pretrained(device="cpu", **{"cache_size": 2} | options)
        except OptionError as error:  # "fast" without kernels
            found[name] = str(error)
            continue
        with record(model, tokenizer) as run, torch.no_grad():
            logits = [model(ids).logits, model(ids[:, :1]).logits]
        found[name] = _digest(each.double().numpy().tobytes() for each in logits), str(logits[0].dtype)
        path = folder / f"{name}.safetensors"
        run.trace.save(path)
        trace = RoutingTrace.load(path)
        found[f"{name}: trace"] = _digest([trace.experts.tobytes(), trace.weights.tobytes()])
    model = from_pretrained(device="cpu", cache_size=2)
    found["chat"] = "".join(ChatSession(model, tokenizer).send("What is 2 + 3?"))
    texts = ("Hello!", "What is the capital of France?")
    requests = [GenerationRequest.chat(tokenizer, text, max_new_tokens=6) for text in texts]
    found["batch"] = [answer.ids for answer in generate_batch(model, requests)]
    source, four = DEMO.parent / "fp16", Quantization(4, 64)
    found["converted"] = _of_files(convert_checkpoint(source, folder / "converted", four), "*.safetensors")
    model.save_pretrained(folder / "saved")
    found["saved"] = _of_files(folder / "saved", "*.safetensors")
    return found


if __name__ == "__main__":
    torch.set_default_dtype(getattr(torch, sys.argv[1]))
    torch.set_default_device(sys.argv[2])
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(answers(Path(folder))))
