"""Refuse impossible values of a config.json before transformers builds anything from it. No weights.

transformers checks few: others become errors deep inside PyTorch, models that take hours to build, or wrong
answers.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeGuard, TypeVar

from mixtral_offload.errors import CheckpointError, OffloadError
from mixtral_offload.models.family import GENERIC

if TYPE_CHECKING:
    from transformers import PretrainedConfig

T = TypeVar("T")
P = ParamSpec("P")
MOST_BYTES = 16 << 20  # of a config.json; the largest that are known have some hundred kB
MOST_INDEX_BYTES = 256 << 20  # of an index; a model of 60 layers of 384 experts at 2 bits has 80 MB
MOST_KEYS = 1_000_000  # of an index; that model has 480,000
MOST_LETTERS = 1000  # of a key
SHOWN = 200  # characters of a value, or of another library's message
#: name -> most: far above any model's, and small enough to build a skeleton in seconds
SIZES = {
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 24,
    "moe_intermediate_size": 1 << 24,
    "expert_ffn_hidden_size": 1 << 24,
    "shared_expert_intermediate_size": 1 << 24,
    "num_hidden_layers": 1000,
    "num_attention_heads": 1 << 16,
    "num_key_value_heads": 1 << 16,
    "head_dim": 1 << 16,
    "vocab_size": 1 << 27,
    "max_position_embeddings": 1 << 40,
    "sliding_window": 1 << 40,
    "num_local_experts": 1 << 14,
    "num_experts": 1 << 14,
    "n_routed_experts": 1 << 14,
    "num_experts_per_tok": 1 << 14,
    "num_experts_per_token": 1 << 14,
    "moe_topk": 1 << 14,
    "moe_k": 1 << 14,
}
MAY_BE_ZERO = {
    "shared_expert_intermediate_size",
    "sliding_window",
    "head_dim",
    "num_local_experts",
    "num_experts",
    "n_routed_experts",
}
NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "max_position_embeddings")
#: other families' names of the number of experts; shared experts are part of a dense layer
OTHER_EXPERTS = re.compile(r"(^|[._])(num|n)_(?!shared)(\w+_)?experts$")
POSITIVE = (
    "rope_theta",
    "factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "partial_rotary_factor",
)
EPSILONS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps")
AGAIN = "download this file again"


def check_file(path: Path) -> None:
    """Raise CheckpointError unless this is a JSON object whose numbers are usable."""
    try:
        check_size(path, MOST_BYTES)
        read = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise _unreadable(path, "a readable file", error.strerror or error) from error
    except (ValueError, RecursionError) as error:  # also numbers of more digits than Python reads
        raise _unreadable(path, "JSON", f"{type(error).__name__}: {str(error)[:SHOWN]}") from error
    if not isinstance(read, dict):
        raise _unreadable(path, "a JSON object", _shown(read))
    for key, value in _walk(read):
        if type(value) is int and abs(value) >= 1 << 63:
            raise _error(path, key, "a number of 64 bits", f"one of {value.bit_length()} bits")
        if type(value) is float and math.isnan(value):
            raise _error(path, key, "a number", "NaN")


def check_config(config: PretrainedConfig, path: Path) -> None:
    """Raise CheckpointError if a size in transformers' configuration is impossible, or if two contradict."""
    text = text_config(config)
    for part in [config] if text is config else [config, text]:
        _check_sizes(part, path, NEEDED if part is text else ())
        for name in EPSILONS:
            value = _value(part, name)
            if value is not None and not (_is_number(value) and 0 <= value <= 1):
                raise _error(path, name, "a number from 0 to 1", _shown(value))
    _check_heads(text, path)
    _check_experts(text, path)
    ropes = {name: getattr(text, name, None) for name in ("rope_parameters", "rope_theta", "rope_scaling")}
    for key, value in _walk(ropes):
        if key.rpartition(".")[2] not in POSITIVE or value is None:
            continue
        if not (_is_number(value) and 0 < value < math.inf):
            raise _error(path, key, "a number above 0", _shown(value))


def _check_sizes(config: PretrainedConfig, path: Path, needed: Collection[str]) -> None:
    for name, most in SIZES.items():
        value = _value(config, name)
        if value is None and (name not in needed or vars(config).get(name, 1) is not None):
            continue  # not given, or each layer has its own
        least = 0 if name in MAY_BE_ZERO else 1
        # some families have one number for each layer
        for one in value if isinstance(value, (list, tuple)) and value else [value]:
            if type(one) is not int or not least <= one <= most:
                raise _error(path, name, f"a whole number from {least} to {most}", _shown(one))


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """Return the configuration of the language model inside; the whole one if it has several or none."""
    try:
        return config.get_text_config()
    except ValueError:  # several of them
        return config


def layer_configs(config: Any) -> list[Any]:
    """Return the configuration of each layer: the same for all, unless layers differ (Gemma 4)."""
    n_layers, layers = config.num_hidden_layers, getattr(config, "per_layer_config", None)
    if layers is None or isinstance(layers, dict) or len(layers) != n_layers:
        return [config] * n_layers
    return [layers[number] for number in range(n_layers)]


def stated_experts(settings: dict[str, object]) -> tuple[str, int] | None:
    """Find a number of experts in a configuration's settings, whatever its name.

    Returns:
        Name and number; None for a dense model.
    """
    for key, value in _walk(settings):
        if OTHER_EXPERTS.search(key) and type(value) is int and value > 1:
            return key, value
    return None


@contextmanager
def building(
    path: Path, what: str = "cannot build the model that this configuration describes"
) -> Iterator[None]:
    """Turn what transformers raises inside, for an impossible configuration, into a CheckpointError."""
    try:
        yield
    except OffloadError:
        raise
    except Exception as error:  # transformers and torch raise many kinds on values that do not go together
        raise CheckpointError(
            what,
            path=path,
            expected="values that go together",
            found=f"{type(error).__name__}: {str(error)[:SHOWN]}",
            hint=AGAIN,
        ) from error


def readable(read: Callable[P, T]) -> Callable[P, T]:
    """Decorate a function that reads a path (its first argument): an OSError becomes a CheckpointError."""

    @functools.wraps(read)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return read(*args, **kwargs)
        except OffloadError:
            raise
        except OSError as error:
            raise CheckpointError(
                "cannot read the checkpoint",
                path=error.filename or args[0],
                found=error.strerror or error,
                hint="check the path and its permissions",
            ) from error

    return wrapped


def check_index(weight_map: dict[str, str], path: Path) -> None:
    """Raise CheckpointError for keys or file names that no checkpoint has. path: the index."""
    if len(weight_map) > MOST_KEYS:
        raise _error(path, None, f"at most {MOST_KEYS:,} keys", f"{len(weight_map):,}")
    for key, name in weight_map.items():
        if len(key) > MOST_LETTERS:
            raise _error(
                path, _shown(key), f"a key of at most {MOST_LETTERS} characters", f"{len(key):,} characters"
            )
        if not isinstance(name, str) or not 0 < len(name.encode("utf-8", "replace")) < 256 or "\0" in name:
            raise _error(path, _shown(key), "a file name", _shown(name))


def check_size(path: Path, most: int) -> None:
    """Raise CheckpointError for a file larger than any real one: reading it would fill the memory."""
    if path.stat().st_size > most:
        raise CheckpointError(
            "the file is too large to be what its name says",
            path=path,
            expected=f"at most {most >> 20} MiB",
            found=f"{path.stat().st_size:,} bytes",
            hint=AGAIN,
        )


def _check_heads(config: PretrainedConfig, path: Path) -> None:
    heads, kv = _value(config, "num_attention_heads"), _value(config, "num_key_value_heads")
    if type(heads) is int and type(kv) is int and heads % kv:
        raise _error(path, "num_key_value_heads", f"a number that divides num_attention_heads, {heads}", kv)


def _check_experts(config: PretrainedConfig, path: Path) -> None:
    n_experts = next((n for name in GENERIC.expert_counts if type(n := _value(config, name)) is int), None)
    for name in GENERIC.top_ks[:-1]:
        top_k = _value(config, name)
        if n_experts and type(top_k) is int and top_k > n_experts:
            raise _error(path, name, f"at most {n_experts}, the number of experts", top_k)


def _value(config: PretrainedConfig, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except Exception:  # a property that other values make impossible: they are checked themselves
        return None


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _walk(value: object, key: str = "") -> Iterator[tuple[str, object]]:
    """Yield (dotted key, value) of everything inside. Not recursive: a file may nest without limit."""
    left = [(key, value)]
    while left:
        key, value = left.pop()
        if isinstance(value, dict):
            left += [(f"{key}.{name}"[-SHOWN:].lstrip("."), inner) for name, inner in value.items()]
        elif isinstance(value, (list, tuple)):
            left += [(key, inner) for inner in value]
        else:
            yield key, value


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _unreadable(path: Path, expected: str, found: object) -> CheckpointError:
    what = "cannot read the configuration"
    return CheckpointError(what, path=path, expected=expected, found=found, hint=AGAIN)


def _error(path: Path, key: str | None, expected: str, found: object) -> CheckpointError:
    return CheckpointError(
        "impossible configuration", path=path, key=key, expected=expected, found=found, hint=AGAIN
    )
