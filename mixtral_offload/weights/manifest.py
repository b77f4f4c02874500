"""What a checkpoint of this package states about itself: bits, groups and shape of every kind of matrix.

It is the `quantization_config` of config.json. No bytes of files, no models.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mixtral_offload.errors import CheckpointError, OptionError
from mixtral_offload.weights.hqq import PUBLISHED, Quantization, Sizes, infer

if TYPE_CHECKING:
    from transformers import PretrainedConfig

METHOD = "mixtral_offload"
FORMAT = 1
#: transformers fills a model with random weights after an unknown `quant_method`. An impossible name of a
#: file to load (`transformers_weights`) stops it, and it shows that name
REFUSAL = (
    "none, for this folder is of mixtral_offload's format, which transformers cannot read. Load it with "
    "mixtral_offload.from_pretrained(folder)"
)
#: entries that `convert` adds to a config.json
OURS = ("quantization_config", "transformers_weights")
AGAIN = "restore this folder's own config.json; convert again if it is lost"


@dataclass(frozen=True)
class Matrix:
    """How one kind of matrix [N, K] is stored."""

    shape: tuple[int, int]
    quantization: Quantization

    def __str__(self) -> str:
        return f"{self.shape[0]}x{self.shape[1]}, {self.quantization}"

    def as_json(self) -> dict:
        """Return the entry of config.json."""
        return {"shape": list(self.shape), **asdict(self.quantization)}


@dataclass(frozen=True)
class Manifest:
    """What config.json states. A reader compares it, because element counts alone leave room for error.

    With another `intermediate_size`, 4-bit groups of 64 look like 2-bit groups of 128.

    Attributes:
        path: config.json.
        experts: "gate", "up", "down" -> matrix, the same in all layers.
        modules: Name of another packed module -> matrix. The name has `*` in place of each number if all
            modules of that pattern are alike.
    """

    path: Path
    experts: Mapping[str, Matrix]
    modules: Mapping[str, Matrix]

    def of_module(self, name: str) -> Matrix | None:
        """Return what is stated about a module; None if nothing is."""
        return self.modules.get(name) or self.modules.get(pattern_of(name))

    def as_config(self) -> dict:
        """Return the entries of config.json."""
        kinds = {
            "experts": {name: matrix.as_json() for name, matrix in self.experts.items()},
            "modules": {name: matrix.as_json() for name, matrix in self.modules.items()},
        }
        return {
            "quantization_config": {"quant_method": METHOD, "format": FORMAT, **kinds},
            "transformers_weights": REFUSAL,
        }


def pattern_of(module: str) -> str:
    """Replace the numbers in a module's name: `layers.3.linear` -> `layers.*.linear`."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", module)


def by_pattern(modules: Mapping[str, Matrix]) -> dict[str, Matrix]:
    """Merge alike modules: name -> matrix, with one entry for all modules of a pattern if these are alike."""
    kinds: dict[str, set[Matrix]] = {}
    for name, matrix in modules.items():
        kinds.setdefault(pattern_of(name), set()).add(matrix)
    return {
        pattern_of(name) if len(kinds[pattern_of(name)]) == 1 else name: matrix
        for name, matrix in modules.items()
    }


def read_manifest(config: PretrainedConfig, path: Path) -> Manifest | None:
    """Read what a configuration states; None if it states nothing in this package's format.

    Args:
        config: transformers' configuration.
        path: Its file, for errors.

    Raises:
        CheckpointError: For another version of the format, or for entries that cannot be read.
    """
    stated = getattr(config, "quantization_config", None)
    if not isinstance(stated, dict) or stated.get("quant_method") != METHOD:
        return None
    key = "quantization_config"
    if stated.get("format") != FORMAT:
        raise CheckpointError(
            "this folder is of another version of mixtral_offload's format",
            path=path,
            key=f"{key}.format",
            expected=FORMAT,
            found=repr(stated.get("format"))[:40],
            hint="use the version that made it, or convert again",
        )
    try:
        experts, modules = (
            {str(name): _matrix(entry) for name, entry in dict(stated[part]).items()}
            for part in ("experts", "modules")
        )
    except (LookupError, TypeError, ValueError, OptionError) as error:
        raise CheckpointError(
            "cannot read what this folder says about its matrices",
            path=path,
            key=key,
            expected="experts, modules: name to shape, bits, group_size, scale_group_size, ...",
            found=f"{type(error).__name__}: {error}"[:200],
            hint=AGAIN,
        ) from error
    return Manifest(path, experts, modules)


def _matrix(entry: Mapping) -> Matrix:
    n, k = entry["shape"]
    numbers = (n, k, entry["bits"], entry["group_size"])
    scales = entry["scale_group_size"]
    if any(type(number) is not int for number in numbers) or not (scales is None or type(scales) is int):
        raise TypeError(f"whole numbers expected in {dict(entry)}")
    flags = (entry["quantize_zero"], entry["split"])
    if any(type(flag) is not bool for flag in flags):
        raise TypeError(f"true or false expected in {dict(entry)}")
    return Matrix((n, k), Quantization(entry["bits"], entry["group_size"], scales, *flags))


def recognise(
    manifest: Manifest | None, file: Path, name: str, shape: tuple[int, int], sizes: Sizes
) -> Quantization:
    """Find how a packed matrix of the dense part is stored.

    Args:
        manifest: What the checkpoint states; None if it states nothing.
        file: The matrix's file, for errors.
        name: The module's name, as in the stored keys.
        shape: (N, K), as in the configuration.
        sizes: Field name -> (dtype, number of elements).

    Raises:
        CheckpointError: If nothing fits, or if shape and quantization are not those stated, or published.
    """
    if manifest is None:
        return _compared(None, None, file, name, shape, sizes)
    matrix = manifest.of_module(name)
    if matrix is None:
        raise CheckpointError(
            "a matrix is packed, of which config.json says nothing",
            path=manifest.path,
            key=name,
            expected=f"one of {', '.join(list(manifest.modules)[:8]) or 'none'}",
            found="no such entry",
            hint=AGAIN,
        )
    return _compared(manifest.path, matrix, file, name, shape, sizes)


def check_experts(
    manifest: Manifest | None,
    file: Path,
    expert: str,
    shapes: Mapping[str, tuple[int, int]],
    sizes: Mapping[str, Sizes],
) -> None:
    """Compare an expert's matrices with what is stated.

    Args:
        file: The expert's file, for errors.
        expert: Its name, for errors.
        shapes: "gate", "up", "down" -> (N, K), as in the configuration.
        sizes: The same -> field name -> (dtype, number of elements).

    Raises:
        CheckpointError: As `recognise` raises it.
    """
    if manifest is not None and manifest.experts.keys() != shapes.keys():
        raise CheckpointError(
            "config.json does not say how the experts' matrices are stored",
            path=manifest.path,
            key="quantization_config.experts",
            expected=", ".join(shapes),
            found=", ".join(manifest.experts) or "nothing",
            hint=AGAIN,
        )
    for name, shape in shapes.items():
        of_matrix, place = sizes.get(name, {}), f"{expert}: {name}"
        if manifest is not None:
            _compared(manifest.path, manifest.experts[name], file, place, shape, of_matrix)
        elif "weight" not in of_matrix:
            _compared(None, None, file, place, shape, of_matrix)


def _compared(
    config: Path | None,
    matrix: Matrix | None,
    file: Path,
    name: str,
    shape: tuple[int, int],
    sizes: Sizes,
) -> Quantization:
    if matrix is not None and matrix.shape != shape:
        raise CheckpointError(
            "config.json contradicts itself: a matrix has another shape than its quantization_config states",
            path=config,
            key=name,
            expected=str(matrix),
            found=f"{shape[0]}x{shape[1]}, by the sizes in the same file",
            hint=f"{AGAIN}: intermediate_size, head_dim and the numbers of heads must not be changed",
        )
    found = infer(shape, sizes, file, name)
    if matrix is not None and matrix.quantization != found:
        raise CheckpointError(
            "a matrix is stored in another way than config.json states",
            path=file,
            key=name,
            expected=str(matrix.quantization),
            found=str(found),
            hint="config.json and weights must be of one folder",
        )
    if matrix is None and (found.bits, found.group_size) not in PUBLISHED:
        known = ", ".join(f"{bits} bits in groups of {group}" for bits, group in sorted(PUBLISHED) if group)
        raise CheckpointError(
            "a packed matrix of no published kind, in a folder that says nothing about itself",
            path=file,
            key=name,
            expected=f"{known}, or a config.json that states another",
            found=f"{shape[0]}x{shape[1]}, {found}",
            hint="check that config.json belongs to these files (intermediate_size, head_dim, heads); "
            "a folder of unusual groups must be converted again: `convert` writes down what they are",
        )
    return found


def check_modules(manifest: Manifest | None, packed: Iterable[str]) -> None:
    """Refuse a statement about a matrix that is not packed; `recognise` refuses the opposite.

    Args:
        packed: Names of the packed matrices of the dense part, as in the stored keys.
    """
    if manifest is None:
        return
    there = set(packed)
    there |= {pattern_of(name) for name in there}
    if missing := sorted(manifest.modules.keys() - there):
        raise CheckpointError(
            "config.json states how a matrix is packed that the files do not hold packed",
            path=manifest.path,
            key=missing[0],
            expected=str(manifest.modules[missing[0]]),
            found="no such packed matrix",
            hint="config.json and weights must be of one folder",
        )


def plain_config(config: PretrainedConfig) -> PretrainedConfig:
    """Copy a configuration for the model to keep, without what only describes the files it was read from."""
    config = copy.deepcopy(config)
    stated = getattr(config, "quantization_config", None)
    if isinstance(stated, dict) and stated.get("quant_method") == METHOD:
        for name in OURS:
            if hasattr(config, name):
                delattr(config, name)
    return config
