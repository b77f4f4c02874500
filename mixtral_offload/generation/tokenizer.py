"""Find and load the tokenizer of a checkpoint, with a chat template; does not know models."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mixtral_offload.errors import CheckpointError, DownloadError, OptionError
from mixtral_offload.models.checkpoint import read_config
from mixtral_offload.models.config_check import check_size
from mixtral_offload.models.registry import family_of
from mixtral_offload.runtime.arguments import HUB, split_arguments
from mixtral_offload.weights.hub_access import hub_token
from mixtral_offload.weights.source import resolve

FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
#: Mixtral-8x7B-Instruct's prompt format, for tokenizers without a template
INSTRUCT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
    "{% elif m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %}[INST] {{ m.content }} [/INST]{{ eos_token }}{% endif %}{% endfor %}"
)
MOST_BYTES = 64 << 20  # of each file; the largest known has 35 MB
MOST_GROWTH = 1000  # factor by which a tokenizer's replacements may lengthen a text
SHOWN = 300  # characters of another library's message
OTHER = "name another: --tokenizer FOLDER_OR_REPO"
#: continues a prompt as it is
RAW_TEMPLATE = "{{ bos_token }}{{ messages[0].content }}"


def load_tokenizer(
    path_or_repo_id: str | Path | None = None,
    tokenizer: str | Path | None = None,
    *,
    hub: dict[str, Any] | None = None,
    **arguments: Any,
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint, or download the family's where the checkpoint has none.

    Args:
        path_or_repo_id: The checkpoint; None for the shipped model.
        tokenizer: Another folder or hub repository with the tokenizer.
        hub: Arguments of the download, as `from_pretrained` takes them. revision and local_dir apply to the
            checkpoint's own repository only.
        arguments: Those of transformers' `from_pretrained`: token, revision, cache_dir and local_files_only
            are used, and what has no effect is accepted.

    Raises:
        DownloadError: There is no tokenizer.
        CheckpointError: The tokenizer cannot be read.
        OptionError: An argument is not supported.
    """
    options, hub = split_arguments(arguments, hub)
    for name, value in options.items():
        if value is not None:
            hint = "set it on the tokenizer afterwards, if it is the tokenizer's"
            what = "load_tokenizer has no such argument"
            raise OptionError(what, expected=", ".join(HUB), found=name, hint=hint)
    elsewhere = {name: value for name, value in hub.items() if name not in ("revision", "local_dir")}
    if tokenizer is not None:
        return _read(resolve(tokenizer, **elsewhere))
    folder = resolve(path_or_repo_id, **hub)
    if any((folder / name).is_file() for name in FILES):
        return _read(folder)
    config = read_config(folder)
    candidates = family_of(config).tokenizers(config)
    errors, where = [], _of_transformers(elsewhere) if candidates else {}
    for candidate in candidates:
        try:
            return _with_template(AutoTokenizer.from_pretrained(candidate, **where))
        except Exception as error:  # of the hub, of transformers, or of a missing package
            errors.append(f"{candidate}: {[*str(error).splitlines(), type(error).__name__][0][:SHOWN]}")
    raise DownloadError(
        "the checkpoint has no tokenizer",
        path=folder,
        expected=" or ".join(FILES),
        found="; ".join(errors) or "none of them",
        hint="name one: --tokenizer FOLDER_OR_REPO",
    )


def _of_transformers(hub: dict[str, Any]) -> dict[str, Any]:
    """Arguments for transformers' download; a token for another endpoint is not sent to the usual one."""
    where = {name: hub[name] for name in ("cache_dir", "local_files_only") if hub.get(name) is not None}
    if hub.get("endpoint") is None and (token := hub_token(hub.get("token"))) is not None:
        where["token"] = token
    return where


def _read(folder: Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a folder, after checks of its size."""
    try:
        for name in FILES:
            if (folder / name).is_file():
                check_size(folder / name, MOST_BYTES)
        tokenizer = _with_template(AutoTokenizer.from_pretrained(folder, local_files_only=True))
        _check_growth(tokenizer, folder)
        return tokenizer
    except CheckpointError:
        raise
    except Exception as error:  # transformers and tokenizers raise many kinds on damaged files
        raise CheckpointError(
            "cannot read the tokenizer",
            path=folder,
            expected=" or ".join(FILES),
            found=f"{type(error).__name__}: {str(error)[:SHOWN]}",
            hint=f"download it again, or {OTHER}",
        ) from error


def _check_growth(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Raise CheckpointError if the tokenizer's replacements could make a text MOST_GROWTH times longer.

    Repeated replacements of one letter by two, in a tokenizer.json, would fill any memory.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        steps = getattr(backend, part, None)
        growth = 1
        for content in _replacements(json.loads(steps.__getstate__())) if steps is not None else ():
            growth *= max(len(content.encode("utf-8", "replace")), 1)
        if growth > MOST_GROWTH:
            raise CheckpointError(
                "the tokenizer's replacements make any text too long",
                path=folder / "tokenizer.json",
                key=part,
                expected=f"at most {MOST_GROWTH} times as long",
                found=f"{growth:.3g} times",
                hint=OTHER,
            )


def _replacements(steps: object) -> Iterator[str]:
    """Yield every text that a tokenizer's steps insert or put in place of another."""
    left = [steps]
    while left:
        step = left.pop()
        if isinstance(step, dict):
            yield from (
                step[key] for key in ("content", "prepend", "replacement") if isinstance(step.get(key), str)
            )
            left += step.values()
        elif isinstance(step, list):
            left += step


def _with_template(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    if tokenizer.chat_template is None:
        tokenizer.chat_template = INSTRUCT_TEMPLATE
    return tokenizer
