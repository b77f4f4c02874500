"""Generation settings: the same rule for a chat, `generate`, jobs and `generate_batch`.

Knows transformers' generation settings and logits. Knows nothing of conversations or batches.
"""

# Answers follow this package's own settings only: max_new_tokens, temperature, top_p, seed, and a top-k of 50
# for sampling. Of a checkpoint's generation_config.json, only the end tokens count; all else that would
# change answers (repetition_penalty, suppress_tokens, num_beams ...) is ignored, with one notice that names
# it. transformers' own `model.generate` still follows the file. An answer ends at the end tokens of
# generation_config.json, of config.json and of the tokenizer, and at the one that the chat template puts
# after an assistant's text (`templates.turn_ends`).

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import isfinite
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from mixtral_offload.errors import CheckpointError, GenerationError, OffloadError, OptionError

if TYPE_CHECKING:
    from mixtral_offload.runtime.offload import OffloadedModel

Model = TypeVar("Model", bound=PreTrainedModel)

FILE = "generation_config.json"
#: transformers' default top_k
TOP_K = 50
#: limit of 1 / temperature: larger factors would leave float32's range
MOST_SHARP = 1e30
#: settings of transformers that do not change the tokens of an answer
WITHOUT_EFFECT = {
    "eos_token_id", "bos_token_id", "pad_token_id", "transformers_version", "use_cache", "max_length",
    "max_new_tokens", "_from_model_config",
}  # fmt: skip
SHOWN = 300  # characters of another library's message


def check_sampling(max_new_tokens: int, temperature: float, top_p: float, seed: int | None) -> None:
    """Check the settings of an answer.

    Raises:
        OptionError: For a value that is out of range.
    """
    for name, value, kind, good, expected in (
        ("max_new_tokens", max_new_tokens, Integral, lambda n: n >= 1, "a whole number from 1"),
        ("temperature", temperature, Real, lambda t: t >= 0 and isfinite(t), "0 (greedy) or more"),
        ("top_p", top_p, Real, lambda p: 0 < p <= 1, "more than 0, 1 at most"),
        ("seed", seed, Integral, lambda n: -(2**63) <= n < 2**64, "a whole number of 64 bits"),
    ):
        if value is None and name == "seed":
            continue
        if not isinstance(value, kind) or isinstance(value, bool) or not good(value):
            raise OptionError(f"impossible {name}", expected=expected, found=repr(value)[:SHOWN])


def generator(seed: int | None) -> torch.Generator:
    """Make a generator for one answer or conversation, independent of all others and of torch's own."""
    made = torch.Generator()
    made.seed() if seed is None else made.manual_seed(seed)
    return made


def choose(
    logits: Tensor,
    generators: Sequence[torch.Generator],
    temperature: float,
    top_p: float,
    name: Callable[[int], str],
) -> Tensor:
    """Choose the next token of each row.

    Args:
        logits: float `[rows, vocabulary]`.
        generators: One for each row; not used if temperature is 0.
        temperature: 0 takes the most probable token.
        top_p: Of the TOP_K most probable tokens, sample among the fewest that have this probability together.
        name: Row -> name of its next token, for errors.

    Returns:
        int64 `[rows]`, on the CPU.

    Raises:
        GenerationError: The logits are not numbers.
    """
    best, token = logits.float().max(-1)
    best, token = best.cpu(), token.cpu()
    if not (finite := best.isfinite()).all():  # nan wins `max`, +inf too; -inf is best only where all are
        row = int((~finite).nonzero()[0])
        raise GenerationError(
            "the model's logits are not numbers",
            key=f"logits of {name(row)}",
            expected="finite logits",
            found=f"{best[row].item()} as the largest",
            hint="the weights may be damaged, or the activations left the dtype's range: try "
            'dtype="float32" or "bfloat16"',
        )
    if temperature == 0:
        return token
    values, tokens = logits.float().topk(min(TOP_K, logits.shape[-1]))
    values, tokens = values.cpu(), tokens.cpu()
    sharp = min(1 / temperature, MOST_SHARP)
    likely = ((values - values[:, :1]) * sharp).softmax(-1)  # sorted, the most probable first
    likely = likely.masked_fill(likely.cumsum(-1) - likely >= top_p, 0.0) if top_p < 1 else likely
    chosen = torch.cat([p.multinomial(1, generator=of) for p, of in zip(likely, generators, strict=True)])
    return tokens.gather(1, chosen[:, None])[:, 0]


def model_ends(model: PreTrainedModel) -> frozenset[int]:
    """Return the end tokens of a model's generation_config.json and config.json."""
    return ends_in(model.generation_config, model.config)


def ends_in(*settings: object) -> frozenset[int]:
    """Return the end tokens of GenerationConfigs, models' configurations, or None."""
    found: set[int] = set()
    for of in settings:
        ends = getattr(of, "eos_token_id", None)
        found |= {ends} if isinstance(ends, int) else {end for end in ends or () if isinstance(end, int)}
    return frozenset(found)


def check_ids(model: PreTrainedModel, ids: Sequence[int]) -> None:
    """Check that the model has an embedding for each token id.

    Raises:
        OptionError: If the tokenizer belongs to another model.
    """
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    n_tokens = len(weight)
    beyond = max(ids, default=0) if min(ids, default=0) >= 0 else min(ids)
    if not 0 <= beyond < n_tokens:
        raise OptionError(
            "the tokenizer does not belong to this model",
            expected=f"token ids below {n_tokens}, the model's vocabulary",
            found=f"id {beyond}",
            hint="name the model's own tokenizer: --tokenizer FOLDER_OR_REPO",
        )


@contextmanager
def forward_errors(model: OffloadedModel) -> Iterator[None]:
    """Turn errors of the model's passes into this package's errors, with the original as their cause.

    Raises:
        OffloadError: For any error inside.
    """
    try:
        yield
    except OffloadError:
        raise
    except torch.OutOfMemoryError as error:
        raise GenerationError(
            "the device is out of memory",
            found=str(error).splitlines()[0][:SHOWN],
            hint="a smaller --cache-size or --context-length, or a smaller batch, leaves more room",
        ) from error
    except OSError as error:
        raise CheckpointError(
            "cannot read the experts any more",
            path=error.filename or model.offload.checkpoint.folder,
            found=str(error.strerror or error)[:SHOWN],
            hint="check the disk; experts in RAM (--store ram) need no files",
        ) from error
    except Exception as error:  # transformers, torch and compiled kernels raise many kinds
        raise GenerationError(
            "the model failed while computing",
            found=f"{type(error).__name__}: {str(error)[:SHOWN]}",
            hint="the error's __cause__ has the details; if the model is sound, please report it",
        ) from error


def with_own_settings(model: Model) -> Model:
    """Return the same model, whose `generate` ignores generation_config.json.

    `generate` takes what its caller leaves open from `self.generation_config`, even if it is given a
    configuration. A second object with the same modules and another `generation_config` prevents that for
    every setting, and changes nothing for other threads.
    """
    same = object.__new__(type(model))
    same.__dict__ = {**model.__dict__, "generation_config": GenerationConfig()}
    return same


def read_generation_config(folder: Path) -> GenerationConfig | None:
    """Read a checkpoint's generation_config.json; None if there is none.

    Raises:
        CheckpointError: If it is damaged.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        found = GenerationConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises many kinds on a damaged file
        raise CheckpointError(
            "cannot read the generation settings",
            path=path,
            expected="a transformers GenerationConfig",
            found=f"{type(error).__name__}: {str(error)[:SHOWN]}",
            hint="download this file again, or delete it",
        ) from error
    for name in ("eos_token_id", "bos_token_id", "pad_token_id"):
        value = getattr(found, name, None)
        several = value if isinstance(value, list) and name == "eos_token_id" else [value]
        if value is not None and not all(type(token) is int for token in several):
            raise CheckpointError(
                "a token id is no number",
                path=path,
                key=name,
                expected="a whole number",
                found=repr(value)[:SHOWN],
                hint="download this file again",
            )
    return found


def ignored_settings(model: PreTrainedModel) -> dict[str, object]:
    """Return the settings of the model's generation_config that would change answers and are ignored."""
    config = model.generation_config
    usual: dict[str, Any] = {}
    try:
        given = config.to_diff_dict()
        usual = getattr(config, "_get_default_generation_params", dict)()
    except Exception:  # a configuration that its own library cannot serialize
        given = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    usual = {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": TOP_K, **usual}
    return {
        name: value
        for name, value in given.items()
        if value not in (None, False)
        and name not in WITHOUT_EFFECT
        and not name.startswith(("output_", "return_"))
        and value != usual.get(name)
    }


_noticed: WeakSet[PreTrainedModel] = WeakSet()


def notice(model: PreTrainedModel) -> str | None:
    """Return a message about ignored settings, once for each model; None if there are none."""
    if model in _noticed:
        return None
    _noticed.add(model)
    ignored = ignored_settings(model)
    if not ignored:
        return None
    named = ", ".join(f"{name}={value!r}" for name, value in ignored.items())
    named = named if len(named) <= SHOWN else f"{named[:SHOWN]}..."
    return f"{FILE} has {named}: ignored, only temperature, top_p and seed count (see runtime/settings.py)"


def warn_once(model: PreTrainedModel, stacklevel: int = 3) -> None:
    """Warn with the text of `notice`."""
    if text := notice(model):
        warnings.warn(text, stacklevel=stacklevel)
