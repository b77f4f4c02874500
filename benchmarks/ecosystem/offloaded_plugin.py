"""pytest plugin: every model with experts that a test of transformers builds gets offloaded ones.

Loaded with `-p benchmarks.ecosystem.offloaded_plugin`. A model that a test has just built with random weights
is written to a temporary checkpoint and opened with `mixtral_offload.from_pretrained`; the test's object
becomes the opened model (or, for a base model, the opened model's). If a test calls `from_pretrained` of a
causal language model, this package's is called with the same arguments. Models with other heads, which this
package does not open, stay as they are.

Training mode and parameters that require gradients are restored, because a fresh model of transformers has
them and one opened by `from_pretrained` does not. Everything else is as this package's users have it.
"""

from __future__ import annotations

import copy
import functools
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import mixtral_offload

#: families whose models get offloaded experts
FAMILIES = tuple(os.environ.get("OFFLOADED_FAMILIES", "mixtral").split())
#: experts per layer on the device; the tests' models have 8 (Mixtral's load-balancing test: 3)
CACHE_SIZE = 2

#: ends of the names of classes whose models get offloaded experts: this package opens no others
OPENED = ("ForCausalLM", "Model")

_depth = 0  # models built inside of another one's construction are its parts
_own_init: dict[type, Callable] = {}
_own_from_pretrained = PreTrainedModel.__dict__["from_pretrained"].__func__


def pytest_configure(config) -> None:
    """Wrap what builds models, after transformers' own conftest is loaded."""
    for cls in _model_classes():
        _own_init[cls] = cls.__init__
        cls.__init__ = _offloading(cls, cls.__init__)
    PreTrainedModel.from_pretrained = classmethod(_from_pretrained)


def _model_classes() -> list[type]:
    """The classes with experts of all families, each after the ones it inherits from."""
    import importlib

    found = []
    for family in FAMILIES:
        module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        for name in module.__all__:
            cls = getattr(module, name)
            if (
                isinstance(cls, type)
                and issubclass(cls, PreTrainedModel)
                and not name.endswith("PreTrainedModel")
            ):
                found.append(cls)
    return found


def _offloading(cls: type, own: Callable) -> Callable:
    @functools.wraps(own)
    def init(self: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        global _depth
        config = args[0] if args else kwargs.get("config")
        if _depth == 0 and getattr(config, "_experts_implementation", None) == "offloaded":
            config._experts_implementation = "eager"  # left by the model that the test built before
        _depth += 1
        try:
            own(self, *args, **kwargs)
        finally:
            _depth -= 1
        if _depth == 0 and type(self) is cls and cls.__name__.endswith(OPENED):
            offload_experts(self)

    return init


def _experts_of(model: PreTrainedModel) -> list[torch.nn.Module]:
    return [of for of in model.modules() if hasattr(of, "is_concatenated") and hasattr(of, "_apply_gate")]


def offload_experts(model: PreTrainedModel) -> None:
    """Turn `model` into what `from_pretrained` opens from it, if it has weights and experts."""
    experts = _experts_of(model)
    tensors = [*model.parameters(), *model.buffers()]
    if not experts or any(tensor.is_meta or not tensor.isfinite().all() for tensor in tensors):
        return
    checkpointing = model.is_gradient_checkpointing
    training, wanted = model.training, {n: p.requires_grad for n, p in model.named_parameters()}
    base, config = model.base_model, model.config
    if "CausalLM" in type(model).__name__:
        opened = _reopened(model)
        _become(model, opened)
    else:  # a base model
        whole = _reopened(_causal(base))
        _become(base, whole.base_model)
        base.__dict__["_whole"] = (whole,)  # what it is saved as; in a tuple: no module of its own
    for module in model.modules():  # one object for all, as transformers has it: tests change it afterwards
        if hasattr(module, "config"):
            module.config = config
    config._experts_implementation = "offloaded"
    if checkpointing:
        model.gradient_checkpointing_enable()
    model.train(training)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(wanted.get(name, False))


def _become(model: PreTrainedModel, opened: PreTrainedModel) -> None:
    """Make `model` another name of `opened`, which has to live on: its forward refers to it weakly."""
    model.__class__, model.__dict__ = opened.__class__, opened.__dict__
    model.__dict__["_opened"] = opened


def _causal(base: PreTrainedModel) -> PreTrainedModel:
    """A causal language model around this base model."""
    global _depth
    config = copy.deepcopy(base.config)
    config.problem_type = None  # of another head
    _depth += 1
    try:
        with torch.random.fork_rng():
            model = AutoModelForCausalLM.from_config(config, dtype=base.dtype)
    finally:
        _depth -= 1
    setattr(model, model.base_model_prefix, base)
    return model


def _reopened(model: PreTrainedModel) -> PreTrainedModel:
    """`model`, written with transformers' own `save_pretrained` and opened by this package."""
    global _depth
    folder = Path(tempfile.mkdtemp(prefix="offloaded."))
    _depth += 1
    try:
        PreTrainedModel.save_pretrained(model, folder)
        with torch.random.fork_rng():
            opened = mixtral_offload.from_pretrained(
                folder,
                device="cpu",
                dtype=model.dtype,
                cache_size=min(CACHE_SIZE, _n_experts(model)),
                store="ram",
            )
    finally:
        _depth -= 1
    weakref.finalize(opened, shutil.rmtree, folder, ignore_errors=True)  # what it is saved from
    return opened


def _n_experts(model: PreTrainedModel) -> int:
    return _experts_of(model)[0].num_experts


def _from_pretrained(cls: type, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
    """This package's for causal language models of the families in a folder, else transformers' own."""
    source = pretrained_model_name_or_path
    mine = (
        cls in _own_init and "CausalLM" in cls.__name__ and source is not None and Path(str(source)).is_dir()
    )
    if mine and _depth == 0 and not args:
        if not kwargs.get(
            "adapter_kwargs", True
        ):  # empty, and added by AutoModel, which adds the checkpoint's config too
            del kwargs["adapter_kwargs"], kwargs["config"]
        return mixtral_offload.from_pretrained(source, **kwargs)
    found = _own_from_pretrained(cls, source, *args, **kwargs)
    if type(found) in _own_init and _depth == 0 and type(found).__name__.endswith(OPENED):
        offload_experts(found)
    return found
