"""What a bit width costs: size on disk, perplexity, and divergence from the unquantized model.

Scores texts as they are; generates nothing.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mixtral_offload.errors import OptionError
from mixtral_offload.generation.templates import encode
from mixtral_offload.models.checkpoint import Checkpoint, open_checkpoint
from mixtral_offload.runtime.build import from_pretrained
from mixtral_offload.runtime.convert import convert_checkpoint
from mixtral_offload.units import gb
from mixtral_offload.weights.hqq import Quantization
from mixtral_offload.weights.source import DEMO, resolve

#: the shipped model in 16 bits, to quantize
DEMO_16 = DEMO.parent / "fp16"
#: conversations that the shipped model was not trained on: the 40 shortest of training/heldout_text.jsonl
HELD_OUT = DEMO.parent / "heldout.jsonl"
Text = str | list[dict[str, str]]  # plain, or messages for the chat template
Prediction = tuple[Tensor, Tensor]  # token ids [T], logits [T - 1, V]
Widths = dict[str, tuple[Quantization | None, Quantization | None]]  # name -> experts, attention


class Perplexity(NamedTuple):
    """Perplexity over a number of predicted tokens."""

    tokens: int
    perplexity: float


class PaperRow(NamedTuple):
    """One Mixtral-8x7B of table 1: size in GB, perplexity on WikiText2 and C4, MMLU accuracy in percent."""

    attention_bits: int
    expert_bits: int
    gb: float
    wikitext2: float
    c4: float
    mmlu: float | None


#: table 1 of arXiv 2312.17238; one cell is empty there
PAPER_TABLE_1 = (
    PaperRow(16, 16, 86.99, 3.59, 6.52, 70.51),
    PaperRow(16, 4, 25.82, 3.67, 6.58, 70.3),
    PaperRow(16, 3, 23.21, 3.96, 6.78, 69.32),
    PaperRow(16, 2, 19.33, 4.52, 7.31, 66.66),
    PaperRow(4, 16, 85.16, 3.68, 6.59, None),
    PaperRow(4, 4, 23.99, 3.76, 6.66, 69.11),
    PaperRow(4, 3, 21.37, 4.05, 6.87, 68.47),
    PaperRow(4, 2, 17.54, 4.61, 7.42, 65.58),
    PaperRow(3, 4, 23.92, 4.06, 6.97, 66.54),
    PaperRow(3, 3, 21.31, 4.34, 7.21, 65.79),
    PaperRow(3, 2, 17.46, 4.90, 7.82, 61.83),
    PaperRow(2, 4, 23.79, 5.08, 8.06, 59.0),
    PaperRow(2, 3, 21.18, 5.36, 8.34, 57.67),
    PaperRow(2, 2, 17.30, 5.97, 9.11, 55.26),
)


def held_out() -> list[list[dict[str, str]]]:
    """Read 40 conversations that the shipped model was not trained on (13,235 tokens to predict)."""
    return [json.loads(line)["messages"] for line in HELD_OUT.read_text(encoding="utf-8").splitlines()]


@torch.inference_mode()
def predictions(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[Text], limit: int = 1024
) -> Iterator[Prediction]:
    """Yield each text's token ids `[T]` and the logits `[T - 1, V]` for all but the first (fp32, CPU).

    Args:
        model: Any causal language model.
        texts: Those of one token are skipped.
        limit: Tokens of each text; the rest is left out.

    Raises:
        OptionError: `texts` is one text, or there is nothing to predict.
    """
    if isinstance(texts, str | dict) or any(isinstance(text, dict) for text in texts):
        raise OptionError("one text in place of several", expected="a list of texts", hint="write [text]")
    device, empty = next(model.parameters()).device, True
    for text in texts:
        if isinstance(text, str):
            ids = tokenizer(text)["input_ids"]
        else:
            ids = encode(tokenizer, text, add_generation_prompt=False)
        row = torch.tensor(ids[:limit])
        if len(row) > 1:
            empty = False
            yield row, model(input_ids=row[None].to(device), use_cache=False).logits[0, :-1].float().cpu()
    if empty:
        raise OptionError("nothing to predict", expected="a text of two tokens or more")


def perplexity(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[Text], limit: int = 1024
) -> Perplexity:
    """Compute the perplexity over all tokens but each text's first; arguments as for `predictions`."""
    total, count = 0.0, 0
    for ids, logits in predictions(model, tokenizer, texts, limit):
        total, count = total + cross_entropy(logits, ids[1:], reduction="sum").item(), count + len(logits)
    return Perplexity(count, math.exp(total / count))


def compare_widths(
    source: str | Path,
    widths: Widths,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Text],
    folder: str | Path,
    limit: int = 1024,
    **options: Any,
) -> list[dict[str, Any]]:
    """Convert the 16-bit checkpoint `source` to each width, in `folder`, and measure what it costs.

    One model is loaded at a time, all its experts on the device. In addition, the unquantized model's
    predictions are in memory: 4 bytes for each token of the texts and each of the vocabulary.

    Args:
        widths: name -> (experts, attention); None keeps 16 bits. A width that is in `folder` is not converted
            again.
        limit: Tokens of each text.
        options: As for `from_pretrained`.

    Returns:
        A row for each width: name; expert_bits, attention_bits (nominal); bits (stored, per expert weight);
        expert_bytes, disk_bytes (all weight files); perplexity; kl (mean Kullback-Leibler divergence of its
        next-token distribution from the unquantized model's, nats per token); agreement (share of tokens for
        which both have the same most probable one).

    Raises:
        CheckpointError: The source is not one.
        OptionError: `folder` holds something else of a width's name.
    """
    origin, rows = resolve(source), []
    predict = partial(_predictions_of, options=options, tokenizer=tokenizer, texts=texts, limit=limit)
    expected = [logits.log_softmax(-1) for _, logits in predict(origin)]
    for name, (experts, attention) in widths.items():
        target = Path(folder) / name.replace("/", "-")
        checkpoint = _converted(open_checkpoint(origin), target, experts, attention)
        attention_bits = attention.bits if attention else 16
        distances = _distances(expected, predict(target))
        rows.append({"name": name, "attention_bits": attention_bits, **_sizes(checkpoint), **distances})
    return rows


def _predictions_of(
    folder: Path,
    options: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Text],
    limit: int,
) -> Iterator[Prediction]:
    model = from_pretrained(folder, cache_size=open_checkpoint(folder).n_experts, **options)
    try:
        yield from predictions(model, tokenizer, texts, limit)
    finally:
        model.offload.close()


def _converted(
    source: Checkpoint, target: Path, experts: Quantization | None, attention: Quantization | None
) -> Checkpoint:
    """The conversion in `target`, made if it is not there. Its config.json states what it was made from."""
    buffer = torch.zeros(source.layout.n_bytes, dtype=torch.uint8)
    source.read_expert(min(source.experts), buffer)
    made = {"crc32": zlib.crc32(buffer.numpy().data), "experts": repr(experts), "attention": repr(attention)}
    if not target.exists():
        convert_checkpoint(source.folder, target, experts, attention, config_extra={"converted_from": made})
    checkpoint = open_checkpoint(target)
    if (found := getattr(checkpoint.config, "converted_from", None)) != made:
        raise OptionError(
            "the folder of this width holds another one, or another model",
            expected=made,
            found=found,
            hint=f"remove {target}, or choose another folder",
        )
    return checkpoint


def _sizes(checkpoint: Checkpoint) -> dict[str, float]:
    layout = checkpoint.layout
    weights = sum(n * k for n, k in layout.shapes.values())
    return {
        "expert_bits": layout.quantization["gate"].bits,
        "bits": 8 * layout.stored_bytes / weights,
        "expert_bytes": len(checkpoint.experts) * layout.stored_bytes,
        "disk_bytes": sum(path.stat().st_size for path in checkpoint.folder.glob("*.safetensors")),
    }


def _distances(expected: list[Tensor], predicted: Iterator[Prediction]) -> dict[str, float]:
    """expected: log-probabilities of the unquantized model, `[T - 1, V]` for each text."""
    loss, divergence, same, count = 0.0, 0.0, 0.0, 0
    for wanted, (ids, logits) in zip(expected, predicted, strict=True):
        found = logits.log_softmax(-1)
        loss -= found.gather(1, ids[1:, None]).sum().item()
        divergence += kl_div(found, wanted, reduction="sum", log_target=True).item()
        same += (found.argmax(-1) == wanted.argmax(-1)).sum().item()
        count += len(found)
    return {"perplexity": math.exp(loss / count), "kl": divergence / count, "agreement": same / count}


def quality_table(rows: Sequence[dict[str, Any]]) -> str:
    """Format rows of `compare_widths` as aligned text."""
    lines = [("", "bits/weight", "experts", "on disk", "perplexity", "KL (nats)", "same token")]
    for row in rows:
        measured = f"{row['perplexity']:.3f}", f"{row['kl']:.5f}", f"{row['agreement']:.1%}"
        lines.append(
            (row["name"], f"{row['bits']:.2f}", gb(row["expert_bytes"]), gb(row["disk_bytes"]), *measured)
        )
    sizes = [max(map(len, column)) for column in zip(*lines)]
    padded = ([line[0].ljust(sizes[0]), *map(str.rjust, line[1:], sizes[1:])] for line in lines)
    return "\n".join("  ".join(line) for line in padded)
