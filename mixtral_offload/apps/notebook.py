"""What the notebooks share: versions, the choice of a model, the size of a download, prompts by domain."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

from mixtral_offload.system.machine import free_memory, total_memory
from mixtral_offload.system.safe_text import visible
from mixtral_offload.units import gb
from mixtral_offload.weights.hub import plan_download
from mixtral_offload.weights.source import DEMO, local_folder

#: Mixtral-8x7B-Instruct with 2-bit experts and 4-bit attention, as 2312.17238's authors published it
PUBLISHED = "lavawolfiee/Mixtral-8x7B-Instruct-v0.1-offloading-demo"
VRAM_FOR_PUBLISHED = 11e9  # bytes; a GPU of 12 GB has that much
LIBRARIES = ("torch", "transformers", "hqq", "huggingface-hub", "ipywidgets", "matplotlib")
_BY_DOMAIN = {
    "stories": (
        "Tell me a story about a fox.",
        "Tell me a story about a boy named Tom.",
        "Write a story with a bird and a mirror.",
    ),
    "arithmetic": ("What is 47 + 38?", "What is 9 times 6?", "Add 15 and 62."),
    "geography": (
        "What is the capital of France?",
        "What is the capital of Peru?",
        "What is the main language of Tunisia?",
    ),
    "python": (
        "How do I sort a list in Python?",
        "How do I open a file in Python?",
        "How do I reverse a string in Python?",
    ),
    "languages": (
        "How do you say good morning in Spanish?",
        'What is the Spanish word for "four"?',
        "How do you say thank you in French?",
    ),
}
#: (domain, prompt): a few for each domain that the shipped model knows; any chat model can answer them
PROMPTS = tuple((domain, prompt) for domain, prompts in _BY_DOMAIN.items() for prompt in prompts)


def show_versions() -> None:
    """Print the versions of the libraries, the GPUs, cores and RAM."""
    print(f"mixtral_offload {version('mixtral-offload')}, Python {platform.python_version()}")
    print(", ".join(f"{name} {_version(name)}" for name in LIBRARIES))
    for number in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(number)
        print(f"cuda:{number}: {gpu.name}, {gb(gpu.total_memory)}")
    if not torch.cuda.is_available():
        print("no GPU")
    print(f"{psutil.cpu_count()} CPU cores, {gb(free_memory())} of {gb(total_memory())} RAM free")


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"


def choose_model(name: str | Path = "auto") -> str | Path:
    """Return the source for `from_pretrained` and `load_tokenizer`, and print the reason.

    Args:
        name: "auto" (the published Mixtral-8x7B if the GPU can hold its cache, else the shipped model),
            "demo", a folder, or a hub repository.
    """
    if name == "demo":
        print("the small Mixtral that ships with the package, as asked")
        return DEMO
    if name != "auto":
        print(f"{visible(str(name), one_line=True)}, as asked")
        return name
    found = "there is no GPU"
    if torch.cuda.device_count():
        gpu = torch.cuda.get_device_properties(0)
        found = f"{gpu.name} has {gb(gpu.total_memory)}"
        if gpu.total_memory >= VRAM_FOR_PUBLISHED:
            print(f"{PUBLISHED}, because {found}")
            return PUBLISHED
    print(f"the small Mixtral that ships with the package, because {found}")
    return DEMO


def show_download(source: str | Path) -> None:
    """Print the size of a download and whether the disk has room for it; download nothing."""
    if local_folder(source) is not None:
        print("already on this disk: there is nothing to download")
        return
    plan = plan_download(str(source))
    files = f"{len(plan.files)} files, {gb(plan.total_bytes)}"
    print(f"{plan.repo_id}: {files}; {gb(plan.remaining_bytes)} to fetch")
    enough = "enough" if plan.free_bytes >= plan.remaining_bytes else "TOO LITTLE"
    print(f"into {visible(str(plan.folder), one_line=True)}\nwhere {gb(plan.free_bytes)} are free: {enough}")
