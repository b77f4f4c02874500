"""transformers' own modelling tests, with this package's experts in place of its own.

    python -m benchmarks.ecosystem.modelling_tests [--source FOLDER] [--families mixtral qwen3_moe]

Every test runs twice: on transformers' models as they are, and with offloaded experts
(`offloaded_plugin.py`). Tests that pass with the former and fail with the latter are listed with the first
line of the failure, and with whether it is a message of this package (an OffloadError). A failure is by
design if `BY_DESIGN` lists it, and a fault otherwise.

The tests are not in transformers' wheel, and are not copied into this repository. Without `--source` they are
taken from the source distribution of the installed version. It has the common tests of all models, but
neither those of generation nor the models' own files: small stand-ins, written here, replace them. `--source`
is a checkout of transformers; its own src/ runs then, so that tests and models match. Writes
benchmarks/results/modelling-tests.json.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from .checks import described, machine, versions

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
#: every error of this package, as pytest prints them
OWN_ERRORS = ("OffloadError", "CheckpointError", "DownloadError", "CapacityError", "OptionError", "JobError")
FAMILIES = ("mixtral",)
ERROR = r"[\w.]*(Error|Exception|Interrupt|Exit)\b"

#: what fails by design: (test, start of the message, why); the same message in another test is a fault
BY_DESIGN = (
    (
        r"test_eager_matches_batched_and_grouped_inference",
        r"OptionError: this needs the experts' weights as parameters",
        "experts are not parameters: no other implementation of them",
    ),
    (
        r"test_resize_embeddings_untied_no_reinit_on_post_init",
        r"OptionError: this needs the experts' weights as parameters",
        "experts are not parameters: not initialised again",
    ),
    (
        r"test_(correct_missing_keys|model_weights_reload_no_missing_tied_weights|can_use_safetensors|load_save_without_tied_weights)",
        r"OptionError: output_loading_info is not supported",
        "from_pretrained returns the model alone",
    ),
    (
        r"test_(load_save_without_tied_weights|reverse_loading_mapping)",
        r"FileNotFoundError: No such file or directory: .*/model\.safetensors",
        "save_pretrained writes one file for each expert, not one for all",
    ),
    (
        r"test_save_load$",
        r"AssertionError: False != True",
        "a base model is saved as the whole, with its generation_config.json",
    ),
    (
        r"test_base_model_prefix_loads_base_weights",
        r"OptionError: (ignore_mismatched_sizes|output_loading_info) is not supported",
        "experts have one size, and from_pretrained returns the model alone",
    ),
    (
        r"test_tp_plan_matches_params",
        r".*entries of the TP-plan are not valid.*experts",
        "experts are not parameters: no tensor parallelism over them",
    ),
    (
        r"test_reverse_loading_mapping",
        r".*(`\.experts\.\*.*in `WeightConverter|AssertionError: \['embed_tokens)",
        "experts are not parameters: nothing to convert back",
    ),
    (
        r"test_generate_compile_model_forward_fullgraph",
        r"torch\._dynamo\.exc\.Unsupported: Skip inlining `torch\.compiler\.disable",
        "experts run outside of compiled graphs: no fullgraph",
    ),
    (
        r"test_cannot_load_with_meta_device_context_manager",
        r"AssertionError: RuntimeError not raised",
        "loads under torch.device('meta') too, with the same logits",
    ),
)

#: in place of the files that a source distribution does not have: path -> text
STAND_INS = {
    "__init__.py": "",
    "exporters/__init__.py": "",
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "generation/__init__.py": "",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "models/__init__.py": "",
}
#: a model's own test file, where there is none: the common tests on a tiny model
MODEL_TEST = """
import unittest

import torch
from transformers import {config}, {causal}, {base}

from ...generation.test_utils import GenerationTesterMixin
from ...test_modeling_common import ModelTesterMixin, ids_tensor, random_attention_mask


class Tester:
    batch_size, seq_length, is_training = 4, 7, True
    hidden_size, num_hidden_layers, num_attention_heads, vocab_size = 32, 2, 4, 99
    causal_lm_class, base_model_class = {causal}, {base}

    def __init__(self, parent):
        self.parent = parent

    def get_config(self):
        return {config}(
            vocab_size=99, hidden_size=32, intermediate_size=32, moe_intermediate_size=16,
            num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
            num_local_experts=8, num_experts=8, num_experts_per_tok=2, shared_expert_intermediate_size=32,
            max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )

    def prepare_config_and_inputs_for_common(self):
        mask = random_attention_mask([self.batch_size, self.seq_length])
        ids = ids_tensor([self.batch_size, self.seq_length], 99)
        return self.get_config(), {{"input_ids": ids, "attention_mask": mask}}


class {base}Test(ModelTesterMixin, GenerationTesterMixin, unittest.TestCase):
    all_model_classes = ({base}, {causal})
    all_generative_model_classes = ({causal},)

    def setUp(self):
        self.model_tester = Tester(self)
"""
#: family -> the start of its classes' names
CLASSES = {"mixtral": "Mixtral", "qwen2_moe": "Qwen2Moe", "qwen3_moe": "Qwen3Moe", "olmoe": "Olmoe"}


@dataclass
class Failure:
    """A test that fails only with offloaded experts."""

    test: str
    message: str
    is_own_message: bool
    by_design: str | None


def get_sdist(folder: Path) -> Path:
    """Unpack the installed transformers' source distribution; returns its folder."""
    wanted = f"transformers=={versions(['transformers'])['transformers']}"
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        "--no-binary",
        "transformers",
        "--no-deps",
        wanted,
    ]
    subprocess.run([*command, "-d", folder], check=True, stderr=subprocess.DEVNULL)
    with tarfile.open(next(folder.glob("transformers-*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    return next(path for path in folder.glob("transformers-*") if path.is_dir())


def stand_in(root: Path, families: tuple[str, ...]) -> None:
    """Write what the source distribution's tests lack."""
    texts = dict(STAND_INS)
    for family in families:
        name = CLASSES[family]
        classes = {"config": f"{name}Config", "causal": f"{name}ForCausalLM", "base": f"{name}Model"}
        texts[f"models/{family}/__init__.py"] = ""
        texts[f"models/{family}/test_modeling_{family}.py"] = MODEL_TEST.format(**classes)
    for path, text in texts.items():
        path = root / "tests" / path
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)


def run_tests(
    root: Path, families: tuple[str, ...], offloaded: bool, options: list[str]
) -> dict[str, tuple[str, str]]:
    """Test -> (outcome, message). outcome: "passed", "failed", "skipped"; subtests count with their test."""
    paths = [f"tests/models/{family}/test_modeling_{family}.py" for family in families]
    plugin = ["-p", "benchmarks.ecosystem.offloaded_plugin"] if offloaded else []
    source = root / "src"  # of a checkout; a source distribution is of the installed version
    places = [source, ROOT] if (root / "tests" / "causal_lm_tester.py").is_file() else [ROOT]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, places)),
        "HF_HUB_OFFLINE": "1",
        "OFFLOADED_FAMILIES": " ".join(families),
    }
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [
            sys.executable,
            *["-m", "pytest", "-q", "-W", "ignore", "-p", "no:cacheprovider", "--tb=short"],
            f"--junitxml={report}",
        ]
        ended = subprocess.run(
            [*command, *plugin, *options, *paths], cwd=root, env=environment, capture_output=True, text=True
        )
        if not report.is_file() or ended.returncode not in (0, 1):
            raise SystemExit(f"pytest did not run:\n{ended.stdout[-3000:]}\n{ended.stderr[-3000:]}")
        return read_report(report)


def read_report(path: Path) -> dict[str, tuple[str, str]]:
    found: dict[str, tuple[str, str]] = {}
    for case in ElementTree.parse(path).iter("testcase"):
        name = f"{case.get('classname').rpartition('.')[2]}.{case.get('name')}"
        bad = next((child for child in case if child.tag in ("failure", "error")), None)
        if bad is not None:  # of several subtests' failures, one in other words than this package's counts
            message = first_line(bad.get("message") or "", bad.text or "")
            if found.get(name, ("passed", ""))[0] != "failed" or not is_own(message):
                found[name] = "failed", message
        elif name not in found:
            found[name] = ("skipped" if case.find("skipped") is not None else "passed"), ""
    return found


def first_line(message: str, text: str) -> str:
    """Return a failure's `Error: first line`; of our own messages also key, expected and found."""
    lines = [line[1:].strip() for line in text.splitlines() if re.match(r"E   ", line)]
    first = next((n for n, line in enumerate(lines) if re.match(ERROR, line)), None)
    if first is None:
        return (next(iter(message.splitlines()), "") or next(iter(lines), ""))[:300]
    details = [line for line in lines[first + 1 :] if line.startswith(("key: ", "expected: ", "found: "))]
    return "; ".join((lines[first].removeprefix("mixtral_offload.errors."), *details))[:300]


def is_own(message: str) -> bool:
    """Whether this is a message of this package's errors."""
    return message.partition(":")[0] in OWN_ERRORS


def compare(own: dict, mine: dict) -> list[Failure]:
    failures = []
    for test, (outcome, _) in own.items():
        found, message = mine.get(test, ("failed", "not run"))
        if outcome == "passed" and found == "failed":
            name = test.partition(".")[2]
            listed = (why for of, start, why in BY_DESIGN if re.match(of, name) and re.match(start, message))
            why = next(listed, None)
            failures.append(Failure(test, message, is_own(message), why))
    return failures


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--source", type=Path, help="a checkout of transformers, in place of the source distribution"
    )
    parser.add_argument("--families", nargs="+", default=FAMILIES, choices=CLASSES)
    parser.add_argument("--out", type=Path, default=RESULTS / "modelling-tests.json")
    parser.add_argument(
        "--pytest", nargs=argparse.REMAINDER, default=[], help="options for pytest, the last argument"
    )
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    families = tuple(arguments.families)
    with tempfile.TemporaryDirectory() as folder:
        root = arguments.source or get_sdist(Path(folder))
        if arguments.source is None:
            stand_in(root, families)
        own = run_tests(root, families, False, arguments.pytest)
        mine = run_tests(root, families, True, arguments.pytest)
        tested = (
            transformers_version(root) if arguments.source else versions(["transformers"])["transformers"]
        )
    failures = compare(own, mine)
    kind = (
        f"checkout of transformers {tested}"
        if arguments.source
        else f"source distribution of transformers {tested}"
    )
    fails = [f"{test}: {message}" for test, (outcome, message) in own.items() if outcome == "failed"]
    print(f"{kind}, {', '.join(families)}; {described(machine() | versions(['torch', 'pytest']))}")
    for label, outcomes in (("transformers' own experts", own), ("offloaded experts", mine)):
        print(f"  {label}: {', '.join(f'{n} {name}' for name, n in counts(outcomes).items())}")
    for line in fails:
        print(f"  fails with transformers' own experts: {line}")
    for failure in sorted(failures, key=lambda failure: (failure.by_design or "", failure.message)):
        whose = "own message" if failure.is_own_message else "not our message"
        verdict = f"by design ({failure.by_design}; {whose})" if failure.by_design else f"FAULT ({whose})"
        print(f"  {failure.test}: {verdict}\n      {failure.message}")
    faults = sum(failure.by_design is None for failure in failures)
    count = f"{len(failures) - faults} by design, {faults} faults"
    print(f"  only with offloaded experts fail {len(failures)}: {count}")
    record = {
        "tests": kind,
        "families": families,
        "machine": machine() | versions(["torch", "pytest"]),
        "own": counts(own),
        "own_failures": fails,
        "offloaded": counts(mine),
        "failures": [asdict(failure) for failure in failures],
    }
    save(arguments.out, record)
    sys.exit(1 if faults else 0)


def save(path: Path, record: dict) -> None:
    """Put this run in the place of the last one of the same tests."""
    kept = json.loads(path.read_text()) if path.is_file() else []
    same = ("tests", "families")
    kept = [of for of in kept if any(of[name] != json.loads(json.dumps(record[name])) for name in same)]
    path.write_text(json.dumps([*kept, record], indent=1) + "\n")


def counts(outcomes: dict) -> dict[str, int]:
    return dict(Counter(outcome for outcome, _ in outcomes.values()))


def transformers_version(root: Path) -> str:
    text = (root / "src" / "transformers" / "__init__.py").read_text()
    return re.search(r'__version__ = "([^"]+)"', text)[1]


if __name__ == "__main__":
    main()
