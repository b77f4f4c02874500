"""The tokenizer that belongs to a checkpoint, with a chat template.

Knows where tokenizers are found. Knows nothing of models.
"""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from .checkpoint import DEMO, read_config
from .errors import CheckpointError, DownloadError
from .hub import resolve

FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
#: the published Mixtral-8x7B checkpoint holds no tokenizer; its own model page is gated, the second is the same, open
MIXTRAL_8X7B = ("mistralai/Mixtral-8x7B-Instruct-v0.1", "Xenova/mistral-tokenizer-v1")
#: Mixtral-8x7B-Instruct's prompt format, for a tokenizer that comes without a template
INSTRUCT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
    "{% elif m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %}[INST] {{ m.content }} [/INST]{{ eos_token }}{% endif %}{% endfor %}"
)
#: continues a text as it is
RAW_TEMPLATE = "{{ bos_token }}{{ messages[0].content }}"


def load_tokenizer(
    path_or_repo_id: str | Path | None = None, tokenizer: str | Path | None = None, *, hub: dict | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer in the checkpoint (None: the shipped model's), or the one named `tokenizer` (folder or hub repository).

    Where a Mixtral-8x7B checkpoint has none, Mixtral's own is fetched. hub applies to the checkpoint's own repository. Raises
    DownloadError if none can be had, CheckpointError for one that cannot be read.
    """
    if tokenizer is not None:
        return _read(resolve(tokenizer))
    folder = DEMO if path_or_repo_id is None else resolve(path_or_repo_id, **(hub or {}))
    if any((folder / name).is_file() for name in FILES):
        return _read(folder)
    config = read_config(folder)
    candidates = MIXTRAL_8X7B if (config.model_type, config.vocab_size) == ("mixtral", 32000) else ()
    errors = []
    for candidate in candidates:
        try:
            return _with_template(AutoTokenizer.from_pretrained(candidate))
        except (OSError, ValueError) as error:
            errors.append(f"{candidate}: {str(error).splitlines()[0]}")
    raise DownloadError(
        "the checkpoint has no tokenizer",
        path=folder,
        expected=" or ".join(FILES),
        found="; ".join(errors) or "none of them",
        hint="name one: --tokenizer FOLDER_OR_REPO",
    )


def _read(folder: Path) -> PreTrainedTokenizerBase:
    try:
        return _with_template(AutoTokenizer.from_pretrained(folder, local_files_only=True))
    except Exception as error:  # transformers and tokenizers raise many kinds on damaged files
        raise CheckpointError(
            "cannot read the tokenizer", path=folder, expected=" or ".join(FILES),
            found=f"{type(error).__name__}: {error}", hint="download it again, or name another: --tokenizer FOLDER_OR_REPO",
        ) from error  # fmt: skip


def _with_template(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    if tokenizer.chat_template is None:
        tokenizer.chat_template = INSTRUCT_TEMPLATE
    return tokenizer
