"""lm_eval on offloaded experts: three small tasks, without a network; compared with the twin.

    python -m benchmarks.ecosystem.lm_eval_tasks

The tasks are made of held-out conversations: multiple choice (log-likelihoods of answers), perplexity
(rolling log-likelihoods), and generation (greedy answers), in batches.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from mixtral_offload.generation.tokenizer import load_tokenizer

from .checks import Check, close, equal, exit_with, run_program
from .twin import conversations, ours, twin

PACKAGES = ("lm_eval", "datasets")
QUESTIONS, TEXTS, BATCH = 16, 8, 4
#: log-likelihoods are sums of tens of logits' differences, in float32
TOLERANCE = 1e-4

TASKS = {
    "shipped_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "shipped_text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}],
    },
    "shipped_answer": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"max_gen_toks": 24, "until": ["\n"], "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}


def write_tasks(folder: Path, tokenizer) -> None:
    """The tasks' settings, and their documents as lines of JSON."""
    turns = [of for of in conversations(54) if of[0]["role"] == "user"][: QUESTIONS * 2]
    asked, answers = ([of[n]["content"] for of in turns] for n in (0, 1))
    documents = []
    for number, text in enumerate(asked[:QUESTIONS]):
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
        )
        choices = [answers[(number + step) % len(answers)] for step in (0, 3, 7)]
        documents.append({"question": prompt, "choices": choices, "label": 0})
    texts = [{"text": tokenizer.apply_chat_template(of, tokenize=False)} for of in conversations(TEXTS)]
    for name, lines in (("questions", documents), ("texts", texts)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, task in TASKS.items():
        data = folder / ("texts.jsonl" if name == "shipped_text" else "questions.jsonl")
        settings = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test",
            "target_delimiter": "",
        }
        (folder / f"{name}.yaml").write_text(json.dumps(settings | task))  # JSON is YAML too


def evaluate(model, tokenizer, folder: Path) -> dict:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH, max_length=1024, add_bos_token=False)
    return simple_evaluate(
        lm, tasks=list(TASKS), task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0, log_samples=True,
    )  # fmt: skip


def scores(found: dict, task: str) -> dict[str, float]:
    return {name: value for name, value in found["results"][task].items() if isinstance(value, float)}


def likelihoods(found: dict, task: str) -> torch.Tensor:
    """All log-likelihoods that a task asked for, in the documents' order."""
    samples = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
    values = [answer for sample in samples for answer in sample["filtered_resps"]]
    return torch.tensor([float(value[0] if isinstance(value, tuple | list) else value) for value in values])


def checks() -> Iterator[Check]:
    tokenizer = load_tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        write_tasks(Path(folder), tokenizer)
        mine, right = (evaluate(model, tokenizer, Path(folder)) for model in (ours(), twin()))
    for task in ("shipped_choice", "shipped_text"):
        yield close(
            f"{task}: log-likelihoods", [likelihoods(mine, task)], [likelihoods(right, task)], TOLERANCE
        )
    for task in TASKS:
        found, expected = scores(mine, task), scores(right, task)
        check = close(
            f"{task}: scores", *([torch.tensor(list(of.values()))] for of in (found, expected)), TOLERANCE
        )
        check.message = ", ".join(f"{name} {value:.4f}" for name, value in found.items())
        yield check
    answers = [
        [sample["filtered_resps"][0] for sample in of["samples"]["shipped_answer"]] for of in (mine, right)
    ]
    yield equal("shipped_answer: greedy answers", *answers)


if __name__ == "__main__":
    exit_with(run_program("lm_eval", PACKAGES, checks))
