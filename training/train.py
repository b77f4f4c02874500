"""One command makes the shipped model: corpus, tokenizer, training, export.

    python -m training.train --minutes 65 --run training/runs/demo

The length of a run is a wall-clock budget: the learning rate warms up, stays, and decays to zero exactly when
the minutes are spent, on any machine. Started again with the same --run, it resumes from the last checkpoint.
The last eighth of the time uses rows of 1024 tokens, the rest rows of 512. At the end the weights are written
as a checkpoint (--out), as training.export also does from any checkpoint of a run.
"""

import argparse
import json
import os
import shutil
import tempfile
import time
from itertools import accumulate
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import MixtralForCausalLM

from training import corpus, tokenizer
from training.export import export
from training.model import LONG, experts_forward, make_config, routing_loss

SHORT, LONG_FROM = 512, 0.87
WARMUP, DECAY_FROM = 0.015, 0.58
ROUTING = 0.2  # loss weight of the routing
HEARD = 0.15  # loss weight of the tokens that the assistant does not say


class Rows:
    """Rows of one length in tokens: conversations one after another, each row starting a new one."""

    def __init__(self, tok, seed: int):
        self.tok, self.stream, self.waiting = tok, corpus.conversations(seed), []

    def _next(self):
        if not self.waiting:
            made = [next(self.stream) for _ in range(64)]
            found = tokenizer.encode(self.tok, [each.messages for each in made])
            self.waiting = [
                (ids, spoken, self._domains(ids, each)) for (ids, spoken), each in zip(found, made)
            ]
        return self.waiting.pop()

    def _domains(self, ids, made) -> list[int]:
        """Return the number of each token's domain; -1 for the start, the system prompt, and mixed tokens."""
        names = list(corpus.DOMAINS)
        turns = [e.domain for e in made.exchanges for _ in range(2)]
        turns = [None] * (1 + len(made.messages) - len(turns)) + turns
        numbers = [names.index(turn) if turn in names else -1 for turn in turns]
        roles = [self.tok.convert_tokens_to_ids(mark) for mark in tokenizer.SPECIAL[3:]]
        return [numbers[turn] for turn in accumulate(token in roles for token in ids)]

    def row(self, length: int):
        parts = ([], [], [])
        while len(parts[0]) < length:
            for part, more in zip(parts, self._next()):
                part += more
        return [part[:length] for part in parts]

    def batch(self, rows: int, length: int):
        """Token ids, whether the assistant says them, and their domains: each [rows, length]."""
        return [torch.tensor(part) for part in zip(*(self.row(length) for _ in range(rows)))]


def rate(done: float, peak: float) -> float:
    """Warm up, stay, then decay to zero; `done` is the share of the time that is spent."""
    if done < WARMUP:
        return peak * (done + 0.001) / WARMUP
    return peak * min(1.0, max(0.0, (1 - done) / (1 - DECAY_FROM)))


def losses(model, ids, spoken, domains, targets):
    """The weighted loss to train on, the plain loss of the assistant's tokens, and the routing's loss."""
    out = model(input_ids=ids, use_cache=False, output_router_logits=True)
    each = torch.nn.functional.cross_entropy(
        out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    )
    mask = spoken[:, 1:].flatten()
    weight = torch.where(mask, 1.0, HEARD)
    routing, information = routing_loss(out.router_logits, domains.flatten(), len(corpus.DOMAINS), targets)
    loss = (each * weight).sum() / weight.sum() + ROUTING * routing
    return loss, each.detach()[mask].mean().item(), routing.item(), information


def optimizer_for(model, peak):
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95), fused=True)


def save(path: Path, model, optimizer, state):
    part = path.with_suffix(".part")
    torch.save(
        {"model": model.state_dict(), "optimizer": optimizer and optimizer.state_dict(), "state": state}, part
    )
    os.replace(part, path)


def make_tokenizer(folder: Path, seed: int, start: Path | None) -> None:
    """Train this run's tokenizer, once, or take that of the checkpoint that it starts from."""
    folder.mkdir(parents=True, exist_ok=True)
    if start and not (folder / "tokenizer").exists():
        shutil.copytree(start.parent / "tokenizer", folder / "tokenizer")
    if not (folder / "tokenizer" / "tokenizer.json").exists():
        tokenizer.train(corpus.conversations(seed + 10**6)).save_pretrained(folder / "tokenizer")


def prepare(folder: Path, seed: int, start: Path | None):
    """The tokenizer and the model of this run, from the last checkpoint if there is one."""
    tok = tokenizer.load(folder / "tokenizer")
    torch.manual_seed(seed)
    model = MixtralForCausalLM(make_config(tok))
    model.set_experts_implementation("eager")
    state = {"step": 0, "tokens": 0, "elapsed": 0.0}
    path = folder / "last.pt"
    saved = torch.load(path, weights_only=True) if path.exists() else None
    if start and not saved:
        model.load_state_dict(torch.load(start, weights_only=True)["model"])
    if saved:
        model.load_state_dict(saved["model"])
        state = saved["state"]
    return tok, model, saved, state


class Clock:
    """The elapsed share of the budget, the same in every worker because it is averaged with the gradients."""

    def __init__(self, minutes: float, elapsed: float):
        self.budget, self.begun, self.elapsed = minutes * 60, time.time() - elapsed, elapsed

    @property
    def done(self) -> float:
        return self.elapsed / self.budget

    def average(self, model, workers: int) -> None:
        """Average the gradients and the clock over the workers."""
        self.elapsed = time.time() - self.begun
        if workers == 1:
            return
        gradients = [p.grad for p in model.parameters()]
        flat = torch.cat([g.flatten() for g in gradients] + [torch.tensor([self.elapsed])])
        dist.all_reduce(flat)
        flat /= workers
        self.elapsed = flat[-1].item()
        for gradient, part in zip(gradients, flat[:-1].split([g.numel() for g in gradients])):
            gradient.copy_(part.view_as(gradient))


def work(rank: int, args, store: str):
    """One worker: a process with one thread and its share of the rows of every step."""
    torch.set_num_threads(args.threads)
    if args.workers > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=args.workers)
    folder = Path(args.run)
    tok, model, saved, state = prepare(folder, args.seed, args.start)
    optimizer = optimizer_for(model, args.lr)
    if saved:
        optimizer.load_state_dict(saved["optimizer"])
    rows = Rows(tok, args.seed + 7919 * state["step"] + 104729 * rank)
    clock, last_save, ema = Clock(args.minutes, state["elapsed"]), time.time(), None
    model.train()
    for layer in model.model.layers:
        layer.mlp.experts.forward = experts_forward.__get__(layer.mlp.experts)
    while clock.done < 1:
        for group in optimizer.param_groups:
            group["lr"] = rate(clock.done, args.lr)
        length = LONG if clock.done > LONG_FROM else SHORT
        batch = rows.batch(args.batch * SHORT // length // args.workers, length)
        loss, said, routing, information = losses(model, *batch, args.experts_per_domain)
        loss.backward()
        clock.average(model, args.workers)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema = said if ema is None else 0.97 * ema + 0.03 * said
        tokens = state["tokens"] + batch[0].numel() * args.workers
        state = {"step": state["step"] + 1, "tokens": tokens, "elapsed": clock.elapsed}
        if rank == 0 and state["step"] % 20 == 0:
            seen = {"said": ema, "routing": routing, "norm": norm, "lr": rate(clock.done, args.lr)}
            rounded = {key: round(value, 5) for key, value in seen.items()}
            print(json.dumps({**state, **rounded, "information": information}), flush=True)
        if rank == 0 and time.time() - last_save > args.save_every * 60:
            save(folder / "last.pt", model, optimizer, state)
            last_save = time.time()
    if rank == 0:
        save(folder / "last.pt", model, optimizer, state)
        save(folder / "final.pt", model, None, state)
        print("finished", json.dumps(state), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", default="training/runs/demo")
    parser.add_argument("--minutes", type=float, default=65)
    parser.add_argument("--batch", type=int, default=8, help="rows of 512 tokens in a step")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2, help="processes that share the rows of a step")
    parser.add_argument("--threads", type=int, default=1, help="threads of each worker")
    parser.add_argument("--save-every", type=float, default=5, help="minutes between checkpoints")
    parser.add_argument("--start", type=Path, help="a checkpoint whose weights a new run starts from")
    parser.add_argument(
        "--experts-per-domain",
        type=float,
        default=3.5,
        help="how many experts' worth of routing one domain may spread over",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("training/runs/fp16"), help="where the checkpoint folder goes"
    )
    args = parser.parse_args()
    make_tokenizer(Path(args.run), args.seed, args.start)
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        if args.workers == 1:
            work(0, args, store)
        else:
            torch.multiprocessing.spawn(work, (args, store), nprocs=args.workers)
    export(Path(args.run), args.out)


if __name__ == "__main__":
    main()
