"""Makes the README's tables from the results that are kept, so that they say what was measured.

    python benchmarks/readme.py [--check]

Everything between `<!-- results -->` and `<!-- end of results -->`, and likewise for reliability, is written anew; --check
only says whether it would change.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def load(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def kernels() -> str:
    found = load("kernels-cpu")
    rows = [
        [
            name,
            f"{row['gb_per_s']:.1f}",
            f"{row['copy_gb_per_s']:.0f}",
            f"{row['over_eager']:.0f}",
            f"{row['error']['token']:.0e}",
            f"{row['prompt_s']['dequantize, then matmul'] / row['prompt_s']['packed']:.1f}",
        ]
        for name, row in found["widths"].items()
    ]
    n, k = found["shape"]
    return (
        f"**Straight from packed bytes** (`python benchmarks/kernels.py`): one token times a {n} x {k} matrix on 2 CPU cores, in "
        f"packed bytes per second, and a prompt of {found['prompt']} tokens.\n\n"
        + table(
            [
                "",
                "GB/s",
                "copies here, GB/s",
                "times dequantizing first",
                "relative difference",
                "prompt: times dequantizing first",
            ],
            rows,
        )
    )


PAPER_T4 = {"full": 2.092, "without prefetch": 1.567, "without cache and prefetch": 1.168, "naive": 0.661}
VARIANTS = {
    "full": "LRU cache and prefetch",
    "without prefetch": "without prefetch",
    "without cache and prefetch": "without cache and prefetch",
    "naive": "naive: every expert of a layer, each time",
    "everything resident": "everything on the device",
}


def ablation() -> str:
    found, rows = load("ablation"), []
    runs = found["runs"]
    for name, words in VARIANTS.items():
        row = [words]
        for of in runs.values():
            speed = of["tokens_per_s"][name]
            row.append(f"{speed:.1f} ({speed / of['tokens_per_s']['naive']:.1f})")
        paper = PAPER_T4.get(name)
        rows.append([*row, f"{paper:.2f} ({paper / PAPER_T4['naive']:.1f})" if paper else ""])
    hits = {k: of["counters"]["full"] for k, of in runs.items()}
    heads = [
        f"{k} experts per layer cached ({of['hits'] / (of['hits'] + of['misses']):.0%} hits)"
        for k, of in hits.items()
    ]
    saves = ", ".join(
        f"{of['prefetch_saves'][1]:.0%} with {k} experts cached (quartiles {of['prefetch_saves'][0]:.0%} and {of['prefetch_saves'][2]:.0%})"
        for k, of in runs.items()
    )
    return (
        "**What the cache and speculative loading are worth** (`python benchmarks/ablation.py`; the paper's table 2): the link is slowed until one "
        f"expert's copy takes as long as {found['copy_s'] / found['layer_s']:.1f} layers' compute ({1e3 * found['copy_s']:.1f} ms), as for 2-bit Mixtral-8x7B on a "
        "T4. Tokens/s while decoding, in brackets as a multiple of the naive way:\n\n"
        + table(["", *heads, "paper, T4"], rows)
        + f"\n\nPrefetch saves {saves} of the time. All variants give the same tokens."
    )


def overlap() -> str:
    found, rows = load("overlap"), []
    for size, of in found["sizes"].items():
        for ahead in ("0", "1", "3"):
            row = of["ahead"][ahead]
            rows.append(
                [
                    f"{size}, {f'guesses {ahead} ahead' if int(ahead) else 'no guesses'}",
                    f"{1e3 * row['s']:.1f}",
                    f"{row['over_replay']:.2f}",
                    f"{row['over_floor']:.2f}",
                    f"{row['wasted_bytes'] / max(row['moved_bytes'], 1):.0%}",
                    f"{of['naive_s'] / row['s']:.1f}",
                ]
            )
    return (
        f"**Overlap** (`python benchmarks/overlap.py`): the shipped model behind a link whose copies take {found['copy_over_layer']:.1f} layers' "
        "compute. The floor is the larger of a token's compute and of the copies its misses need; the replay is the best schedule for "
        "the same trace (`mixtral_offload/analysis/timed_replay.py`).\n\n"
        + table(
            [
                "experts cached per layer",
                "ms per token",
                "over its replay",
                "over the floor",
                "of the bytes wasted",
                "times the naive way",
            ],
            rows,
        )
    )


def assisted() -> str:
    found = load("assisted")["rows"]
    ways = list(dict.fromkeys(row["way"] for row in found))
    groups = list(dict.fromkeys((row["cache_size"], row["prompts"]) for row in found))
    rows = [
        [f"{size} cached, {kind}"]
        + [
            f"{row['speedup']:.2f} ({row['tokens_per_pass']:.1f})"
            for row in found
            if (row["cache_size"], row["prompts"]) == (size, kind)
        ]
        for size, kind in groups
    ]
    return (
        "**Several tokens per pass** (`python benchmarks/assisted.py`): transformers' assisted generation over the same slow link; speed "
        "as a multiple of plain decoding, in brackets tokens per pass. `prompt_lookup_num_tokens` costs nothing to try; the draft model "
        "here is the same model with everything on the device, so always right: a bound.\n\n"
        + table(["", *ways], rows)
    )


def fullsize() -> str:
    found = load("fullsize")
    rows = []
    for name, row in found["contestants"].items():
        if "tokens_per_s" not in row:
            rows.append([name, row.get("missing") or "failed: " + row["failed"], "", "", "", ""])
            continue
        memory = row.get("full_size_bytes") or row["anon_bytes"]
        rows.append(
            [
                name,
                f"{row['tokens_per_s']:.2f}",
                f"{row['first_token_s']:.0f}",
                f"{memory / 1e9:.1f}",
                f"{row['bytes_per_token'] / 1e9:.2f}" if "bytes_per_token" in row else "",
                f"{row['hit_rate']:.0%}" if "hit_rate" in row else "",
            ]
        )
    settings = found["settings"]
    return (
        f"**Full size** (`python benchmarks/fullsize.py --folder FOLDER`): {found['checkpoint']['parameters'] / 1e9:.1f} billion random packed parameters "
        f"({found['checkpoint']['bytes'] / 1e9:.0f} GB) on 2 CPU cores, experts on disk, {settings['ram']} of RAM; routing replayed from a trace as "
        f"local as Mixtral's. accelerate's disk offload runs {settings['accelerate_layers']} layers of the same weights in 16 bits, scaled to 32.\n\n"
        + table(
            [
                "",
                "tokens/s",
                f"first token of {settings['prompt']}, s",
                "memory, GB (page cache aside)",
                "GB read per token",
                "hits",
            ],
            rows,
        )
    )


def t4() -> str:
    found = load("t4-projection")
    rows = [
        [
            f"{row['bits']} bits, {row['vram']}, {row['link']}, {row['look_ahead']} ahead",
            f"{row['tokens_per_s']:.1f}",
            f"{row['link_bound_tokens_per_s']:.1f}",
            f"{row['first_token_s']:.1f}",
            f"{row['experts_per_layer']:.1f} of 8",
            {"ram": "RAM", "disk": "disk"}[row["store"]],
        ]
        for row in found["rows"]
    ]
    return (
        "**A T4, projected, not measured** (`python benchmarks/t4.py`): Mixtral-8x7B's byte counts, the plan of `mixtral-offload plan`, "
        f"kernels at half of 320 GB/s, {1e3 * found['host_s']:.1f} ms of host time per layer as measured here.\n\n"
        + table(
            [
                "",
                "tokens/s",
                "link alone",
                "first token of 500, s",
                "experts on the device",
                "where the others are",
            ],
            rows,
        )
    )


def batch() -> str:
    found = load("batch")
    sizes, n_experts = ("1", "8", "32", "64"), 8
    rows = []
    for of in found["sweeps"]:
        if of["prefetch"]:
            continue
        k, one = of["cache_size"], of["tokens_per_s"]["1"]
        cells = [
            f"{of['tokens_per_s'][n]:.0f} ({of['tokens_per_s'][n] / one:.1f}; {of['bytes_per_token'][n] / 1e3:.0f})"
            for n in sizes
        ]
        rows.append(
            ["everything on the device" if k == n_experts else f"{k} experts per layer cached", *cells]
        )
    variants = [*next(iter(found["ablations"].values()))["tokens_per_s"]]
    shares = [
        [where, *(f"{of['tokens_per_s'][name] / of['tokens_per_s'][variants[0]]:.2f}" for name in variants)]
        for where, of in found["ablations"].items()
    ]
    passes = found["passes"]
    beside = [[name, *(f"{of[n]:.2f}" for n in of)] for name, of in passes["over_best"].items()]
    n_sizes = [*next(iter(passes["over_best"].values()))]
    new = sorted({n for _, n in found["requests"]})
    return (
        f"**Many sequences at once** (`python benchmarks/batch.py`; 2211.10017): {len(found['requests'])} requests of {found['settings']['even']} new tokens, "
        "over a link as slow as in the ablation. Tokens/s, prompts' time included; in brackets as a multiple of a batch of 1, and kB moved per token:\n\n"
        + table(["batch", *sizes], rows)
        + "\n\nA few sequences hardly gain behind a slow link: together they need nearly all experts of a layer, where one would keep those that its last "
        "token used."
        + f"\n\nEach optimization taken away alone, at batch {found['settings']['ablation_batch']}, answers of {new[0]} to {new[-1]} tokens: throughput as a share of all of them.\n\n"
        + table(["", *variants], shares)
        + "\n\nOne pass with everything on the device, speed over the best of transformers' own experts implementations on the same weights dequantized, by "
        "batch size (`dequantize_on_load=True` is our way to have them so):\n\n"
        + table(["", *n_sizes], beside)
    )


def reliability() -> str:
    found = load("reliability")
    rows = [
        [of["what"], f"{of['wrong']:,}", f"{of['tried']:,} {of['unit']}",
         f"{of['machine']['processor']} ({of['machine']['instruction_sets']})"]
        for of in found.values()
    ]  # fmt: skip
    return (
        "`python -m tests.reliability.run` tries all of it; the tests run each in a short form.\n\n"
        + table(["what", "wrong", "of", "on"], rows)
    )


def results() -> str:
    parts = [ablation(), overlap(), batch(), assisted(), kernels(), fullsize(), t4()]
    return "\n\n".join(parts)


def filled(text: str, name: str, content: str) -> str:
    """The text with `content` between the marks of this name."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, rest = text.split(begin)
    return f"{before}{begin}\n{content}\n{end}{rest.split(end)[1]}"


def main() -> int:
    readme = ROOT / "README.md"
    text = readme.read_text()
    new = filled(filled(text, "results", results()), "reliability", reliability())
    if "--check" in sys.argv[1:]:
        print(
            "README's tables are those of the results"
            if new == text
            else "README's tables are old: python benchmarks/readme.py"
        )
        return int(new != text)
    readme.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
