"""The tokenizer that belongs to a checkpoint, with a chat template.

Knows where tokenizers are found. Knows nothing of models.
"""

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
#: Mixtral-8x7B-Instruct's prompt format, for a tokenizer that comes without a template
INSTRUCT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
    "{% elif m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %}[INST] {{ m.content }} [/INST]{{ eos_token }}{% endif %}{% endfor %}"
)
MOST_BYTES = 64 << 20  # of each file; the largest that are known have 35 MB
MOST_GROWTH = 1000
SHOWN = 300  # characters of another library's message
OTHER = "name another: --tokenizer FOLDER_OR_REPO"
#: continues a text as it is
RAW_TEMPLATE = "{{ bos_token }}{{ messages[0].content }}"


def load_tokenizer(
    path_or_repo_id: str | Path | None = None,
    tokenizer: str | Path | None = None,
    *,
    hub: dict | None = None,
    **arguments: Any,
) -> PreTrainedTokenizerBase:
    """The tokenizer in the checkpoint (None: the shipped model's), or the one named `tokenizer` (folder or hub repository).

    Where a Mixtral-8x7B checkpoint has none, Mixtral's own is fetched. hub: arguments of the download, as `from_pretrained`
    takes them. arguments: those of transformers' own `from_pretrained`, as there: token, revision, cache_dir and
    local_files_only are understood, what changes nothing is accepted, the rest is refused. revision and local_dir apply to
    the checkpoint's own repository only. Raises DownloadError if none can be had, CheckpointError for one that cannot be
    read, OptionError for an argument.
    """
    options, hub = split_arguments(arguments, hub)
    for name, value in options.items():
        if value is not None:
            hint = "set it on the tokenizer afterwards, if it is the tokenizer's"
            raise OptionError(
                "load_tokenizer has no such argument", expected=", ".join(HUB), found=name, hint=hint
            )
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
        except Exception as error:  # of the hub, of transformers, or of a package that is not here
            errors.append(f"{candidate}: {[*str(error).splitlines(), type(error).__name__][0][:SHOWN]}")
    raise DownloadError(
        "the checkpoint has no tokenizer",
        path=folder,
        expected=" or ".join(FILES),
        found="; ".join(errors) or "none of them",
        hint="name one: --tokenizer FOLDER_OR_REPO",
    )


def _of_transformers(hub: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the download, for transformers' own; a token for another endpoint is not sent to the usual one."""
    where = {name: hub[name] for name in ("cache_dir", "local_files_only") if hub.get(name) is not None}
    if hub.get("endpoint") is None and (token := hub_token(hub.get("token"))) is not None:
        where["token"] = token
    return where


def _read(folder: Path) -> PreTrainedTokenizerBase:
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
            "cannot read the tokenizer", path=folder, expected=" or ".join(FILES),
            found=f"{type(error).__name__}: {str(error)[:SHOWN]}", hint=f"download it again, or {OTHER}",
        ) from error  # fmt: skip


def _check_growth(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Refuses a tokenizer whose replacements could make a text, or an answer, more than MOST_GROWTH times as long: some
    lines in tokenizer.json that replace a letter by two, again and again, would fill any memory."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        steps = getattr(backend, part, None)
        growth = 1
        for content in _replacements(json.loads(steps.__getstate__())) if steps is not None else ():
            growth *= max(len(content.encode("utf-8", "replace")), 1)
        if growth > MOST_GROWTH:
            raise CheckpointError(
                "the tokenizer's replacements make any text too long", path=folder / "tokenizer.json", key=part,
                expected=f"at most {MOST_GROWTH} times as long", found=f"{growth:.3g} times", hint=OTHER,
            )  # fmt: skip


def _replacements(steps: object) -> Iterator[str]:
    """What is put in place of something else, or in front of it, anywhere in a tokenizer's steps."""
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
