"""Makes the README's tables from the stored results.

    python benchmarks/readme.py [--check]

Writes everything between `<!-- results -->` and `<!-- end of results -->`, and likewise for reliability.
--check only tells whether it would change.
"""

import json
import sys
from pathlib import Path

from machine import words as in_words

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def load(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def where(found: dict) -> str:
    """Where a result was measured; older ones do not tell."""
    machine = found["machine"]
    return (
        in_words(machine)
        if isinstance(machine, dict)
        else "2 cores, before the kernels in C, processor not recorded"
    )


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def kernels() -> str:
    """A table for each instruction set that was measured."""
    parts = []
    for path in sorted(RESULTS.glob("kernels-*.json")):
        found = json.loads(path.read_text())
        if "card" in found["machine"]:
            continue
        n, k = found["shape"]
        text = (
            "**Straight from packed bytes** (`python benchmarks/products.py`; "
            f"{in_words(found['machine'])}): one token times a {n} x {k} matrix, in GB of packed bytes per "
            f"second, with relative errors; a prompt of {found['prompt']} tokens, as a multiple of the "
            "library's product with an fp32 matrix; and one token times a "
            f"{found['small'][0]} x {found['small'][1]} matrix, in us."
        )
        ways = list(next(iter(found["widths"].values()))["gb_per_s"])
        head = ["", *ways, "copies here", "prompt: exact", "prompt: dequantized first"]
        head += ["small: exact", "small: dequantized first"]
        rows = []
        for name, row in found["widths"].items():
            speeds = (f"{row['gb_per_s'][way]:.1f} ({row['error'][way]:.0e})" for way in ways)
            prompt, small = row["prompt_s"], found["small_widths"][name]
            library = prompt["library, fp32"]
            cells = (f"{prompt[way] / library:.1f}" for way in ("exact", "dequantized first"))
            micro = (f"{1e6 * small[way]:.0f}" for way in ("exact", "dequantized first"))
            rows.append([name, *speeds, f"{row['copy_gb_per_s']:.0f}", *cells, *micro])
        parts.append(f"{text}\n\n{table(head, rows)}")
    return "\n\n".join(parts)


def shipped() -> str:
    """A table for each machine that ran it."""
    parts = []
    for path in sorted(RESULTS.glob("shipped-*.json")):
        found = json.loads(path.read_text())
        apart = found["divergence"]
        text = (
            f"**The shipped model with these kernels** (`python benchmarks/shipped.py`; "
            f"{in_words(found['machine'])}): milliseconds per token or pass. The next token's distribution "
            f"diverges from that of torch's products by {apart['exact']['kl_nats']:.0e} nats, with "
            f'`precision="fast"` by {apart["fast"]["kl_nats"]:.0e} nats ({apart["tokens"]} tokens).'
        )
        ways = list(next(iter(found["seconds"].values())))
        rows = [
            [name, *(f"{1e3 * of[way]:.1f}" if way in of else "" for way in ways)]
            for name, of in found["seconds"].items()
        ]
        parts.append(f"{text}\n\n{table(['', *ways], rows)}")
    return "\n\n".join(parts)


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
    layers, copy_ms = found["copy_s"] / found["layer_s"], 1e3 * found["copy_s"]
    text = (
        "**The effect of the cache and of speculative loading** (`python benchmarks/ablation.py`; "
        f"{where(found)}; the paper's table 2). The link is throttled: the copy of an expert takes as long "
        f"as {layers:.1f} layers' compute ({copy_ms:.1f} ms), as for 2-bit Mixtral-8x7B on a T4. "
        "Tokens/s while decoding; in brackets, as a multiple of the naive variant:"
    )
    for name, words in VARIANTS.items():
        row = [words]
        for of in runs.values():
            speed = of["tokens_per_s"][name]
            row.append(f"{speed:.1f} ({speed / of['tokens_per_s']['naive']:.1f})")
        paper = PAPER_T4.get(name)
        rows.append([*row, f"{paper:.2f} ({paper / PAPER_T4['naive']:.1f})" if paper else ""])
    heads, saves = [], []
    for k, of in runs.items():
        hits, misses = (of["counters"]["full"][name] for name in ("hits", "misses"))
        heads.append(f"{k} experts per layer cached ({hits / (hits + misses):.0%} hits)")
        low, median, high = of["prefetch_saves"]
        saves.append(f"{median:.0%} with {k} experts cached (quartiles {low:.0%} and {high:.0%})")
    return (
        f"{text}\n\n{table(['', *heads, 'paper, T4'], rows)}\n\n"
        f"Prefetch saves {', '.join(saves)} of the time. All variants give the same tokens."
    )


def overlap() -> str:
    found, rows = load("overlap"), []
    text = (
        f"**Overlap** (`python benchmarks/overlap.py`; {where(found)}): the shipped model behind a link "
        f"whose copies take {found['copy_over_layer']:.1f} layers' compute. The floor is the larger of a "
        "token's compute and of the copies that its misses need; the replay is the best schedule for the "
        "same trace (`mixtral_offload/analysis/timed_replay.py`)."
    )
    for size, of in found["sizes"].items():
        for ahead in ("0", "1", "3"):
            row = of["ahead"][ahead]
            name = f"{size}, {f'predictions {ahead} ahead' if int(ahead) else 'no predictions'}"
            over = f"{row['over_replay']:.2f}", f"{row['over_floor']:.2f}"
            wasted = f"{row['wasted_bytes'] / max(row['moved_bytes'], 1):.0%}"
            rows.append([name, f"{1e3 * row['s']:.1f}", *over, wasted, f"{of['naive_s'] / row['s']:.1f}"])
    head = ["experts cached per layer", "ms per token", "over its replay", "over the floor"]
    return f"{text}\n\n{table([*head, 'bytes wasted', 'times as fast as naive'], rows)}"


def assisted() -> str:
    result = load("assisted")
    found = result["rows"]
    text = (
        f"**Several tokens per pass** (`python benchmarks/assisted.py`; {where(result['settings'])}): "
        "transformers' assisted generation over the same link; speed as a multiple of plain "
        "decoding, in brackets tokens per pass. "
        "`prompt_lookup_num_tokens` needs no second model. The draft model here is the same model with "
        "everything on the device: it is always right, so its row is an upper bound."
    )
    ways = list(dict.fromkeys(row["way"] for row in found))
    rows = []
    for size, kind in dict.fromkeys((row["cache_size"], row["prompts"]) for row in found):
        of = [row for row in found if (row["cache_size"], row["prompts"]) == (size, kind)]
        cells = (f"{row['speedup']:.2f} ({row['tokens_per_pass']:.1f})" for row in of)
        rows.append([f"{size} cached, {kind}", *cells])
    return f"{text}\n\n{table(['', *ways], rows)}"


def fullsize() -> str:
    """A table for each machine that ran it."""
    return "\n\n".join(_fullsize(path) for path in sorted(RESULTS.glob("fullsize*.json")))


def _fullsize(path: Path) -> str:
    found, rows = json.loads(path.read_text()), []
    machine = found["machine"]
    where = in_words(machine) if "kernels" in machine else "2 cores with AVX-512, before the kernels in C"
    made, settings = found["checkpoint"], found["settings"]
    text = (
        f"**Full size** (`python benchmarks/fullsize.py --folder FOLDER`): {made['parameters'] / 1e9:.1f} "
        f"billion random packed parameters ({made['bytes'] / 1e9:.0f} GB), {settings['ram']} of RAM, the "
        f"other experts on disk ({where}); routing replayed from a trace with Mixtral's locality."
    )
    if "accelerate" in found["contestants"]:
        text += (
            f" accelerate's disk offload runs {settings['accelerate_layers']} layers of the same weights in "
            "16 bits, scaled to 32."
        )
    for name, row in found["contestants"].items():
        if "tokens_per_s" not in row:
            rows.append([name, row.get("missing") or "failed: " + row["failed"], "", "", "", ""])
            continue
        memory = (row.get("full_size_bytes") or row["anon_bytes"]) / 1e9
        cells = [f"{row['tokens_per_s']:.2f}", f"{row['first_token_s']:.0f}", f"{memory:.1f}"]
        cells += [f"{row['bytes_per_token'] / 1e9:.2f}" if "bytes_per_token" in row else ""]
        rows.append([name, *cells, f"{row['hit_rate']:.0%}" if "hit_rate" in row else ""])
    head = ["", "tokens/s", f"first token of {settings['prompt']}, s", "memory without page cache, GB"]
    return f"{text}\n\n{table([*head, 'GB read per token', 'hits'], rows)}"


def fullsize_in_ram() -> str:
    found, rows = load("in-ram-avx2"), []
    for name, run in found["runs"].items():
        if "llama.cpp" not in run["contestants"]:
            continue
        ours, theirs = run["contestants"]["ours"], run["contestants"]["llama.cpp"]
        prompt, speeds = run["settings"]["prompt"], (ours["tokens_per_s"], theirs["tokens_per_s"])
        shown = [f"{speed:.2f}" for speed in speeds] if prompt == 64 else ["", ""]
        ratio = f"{speeds[0] / speeds[1]:.2f}" if prompt == 64 else ""
        firsts = [f"{of['first_token_s']:.0f}" for of in (ours, theirs)]
        family = run["settings"].get("family", "mixtral")
        model = {"mixtral": "Mixtral-8x7B, 2 bits", "qwen3_moe": "Qwen3-30B-A3B, 4 bits"}[family]
        precision = "fast" if "fast" in name else "exact"
        rows.append([f"{model}, {precision}, prompt of {prompt}", *shown, ratio, *firsts])
    head = ["", "tokens/s", "llama.cpp", "ratio", "first token, s", "llama.cpp"]
    return (
        "**Full size, everything in RAM, beside llama.cpp** (`python benchmarks/fullsize.py --ram 21GB "
        '--prompt 64 --rivals llama.cpp`, with `--options \'{"precision": "fast"}\'` for fast, with '
        "`--family qwen3_moe --bits 4 --ram 20GB` for the other shape; "
        f"{in_words(found['machine'])}): random weights of these shapes; llama.cpp "
        f"{found['machine']['llama_cpp_python']} with Q2_K experts, or with Q4_K_M.\n\n{table(head, rows)}"
    )


def t4() -> str:
    found, rows = load("t4-projection"), []
    text = (
        "**A T4, projected, not measured** (`python benchmarks/t4.py`): Mixtral-8x7B's byte counts, the "
        f"plan of `mixtral-offload plan`, kernels at half of 320 GB/s, {1e3 * found['host_s']:.1f} ms of "
        "host time per layer as measured here."
    )
    for row in found["rows"]:
        name = f"{row['bits']} bits, {row['vram']}, {row['link']}, {row['look_ahead']} ahead"
        speeds = f"{row['tokens_per_s']:.1f}", f"{row['link_bound_tokens_per_s']:.1f}"
        place = {"ram": "RAM", "disk": "disk"}[row["store"]]
        held = f"{row['experts_per_layer']:.1f} of 8"
        rows.append([name, *speeds, f"{row['first_token_s']:.1f}", held, place])
    head = [
        "",
        "tokens/s",
        "link alone",
        "first token of 500, s",
        "experts on the device",
        "store of the others",
    ]
    return f"{text}\n\n{table(head, rows)}\n\n{_misses(found)}"


def _misses(found: dict) -> str:
    where, rows = found["machine"], []
    for row in found["misses"]:
        speeds = [f"{row['tokens_per_s'][of]:.1f}" for of in ("copy", "cpu", "auto")]
        times = f"{1e3 * row['copy_s']:.1f}", f"{1e3 * row['cpu_expert_s']:.1f}"
        computed = f"{row['computed_per_token']['auto']:.1f} of {row['misses_per_token']['auto']:.1f}"
        name = f"{row['model']}, {row['bits']} bits, {row['link']}, {row['prefetch']} predicted"
        rows.append([name, *times, *speeds, computed])
    text = (
        "The same with RAM for all experts and 15 GB on the device: misses copied, computed by the CPU, or "
        f"split (`misses=`), tokens/s. The CPU's rate is that of one core here ({in_words(where)})."
    )
    head = ["", "a copy, ms", "on the CPU, ms", "copy", "cpu", "auto", "misses that auto computes, per token"]
    return f"{text}\n\n{table(head, rows)}"


def batch() -> str:
    found = load("batch")
    settings, n_requests = found["settings"], len(found["requests"])
    new = sorted({n for _, n in found["requests"]})
    sweeps = _sweeps(found["sweeps"], ("1", "8", "32", "64"))
    ablations = [of["tokens_per_s"] for of in found["ablations"].values()]
    variants = [*ablations[0]]
    shares = [
        [where, *(f"{speeds[name] / speeds[variants[0]]:.2f}" for name in variants)]
        for where, speeds in zip(found["ablations"], ablations)
    ]
    over_best = found["passes"]["over_best"]
    passes = [[name, *(f"{ratio:.2f}" for ratio in of.values())] for name, of in over_best.items()]
    return (
        f"**Many sequences at once** (`python benchmarks/batch.py`; {where(found)}; 2211.10017): "
        f"{n_requests} requests of {settings['even']} new tokens, over a link throttled as in the ablation. "
        f"Tokens/s, prompts' time included; in brackets, the multiple of a batch of 1, and kB moved per "
        f"token:\n\n{sweeps}\n\nA few sequences gain little behind a slow link: together they need nearly "
        "all experts of a layer, while one sequence mostly reuses the experts of its last token.\n\n"
        "One optimization switched off at a "
        f"time, at batch {settings['ablation_batch']}, answers of {new[0]} to {new[-1]} tokens; throughput "
        f"relative to all of them:\n\n{table(['', *variants], shares)}\n\nOne pass with everything on the "
        "device, by batch size: speed relative to the fastest of transformers' own experts implementations "
        "on the same weights, dequantized. `dequantize_on_load=True` dequantizes them here "
        f"too:\n\n{table(['', *next(iter(over_best.values()))], passes)}"
    )


def _sweeps(sweeps: list[dict], batch_sizes: tuple[str, ...], n_experts: int = 8) -> str:
    rows = []
    for of in sweeps:
        if of["prefetch"]:
            continue
        k, speeds, moved = of["cache_size"], of["tokens_per_s"], of["bytes_per_token"]
        where = "everything on the device" if k == n_experts else f"{k} experts per layer cached"
        cells = (
            f"{speeds[n]:.0f} ({speeds[n] / speeds['1']:.1f}; {moved[n] / 1e3:.0f})" for n in batch_sizes
        )
        rows.append([where, *cells])
    return table(["batch", *batch_sizes], rows)


def reliability() -> str:
    rows = []
    for of in load("reliability").values():
        machine = f"{of['machine']['processor']} ({of['machine']['instruction_sets']})"
        rows.append([of["what"], f"{of['wrong']:,}", f"{of['tried']:,} {of['unit']}", machine])
    text = "`python -m tests.reliability.run` runs all of it; the tests run each in a short form."
    return f"{text}\n\n{table(['what', 'wrong', 'of', 'on'], rows)}"


def results() -> str:
    parts = [
        ablation(),
        overlap(),
        batch(),
        assisted(),
        kernels(),
        shipped(),
        fullsize_in_ram(),
        fullsize(),
        t4(),
    ]
    return "\n\n".join(parts)


def filled(text: str, name: str, content: str) -> str:
    """Put `content` between the marks of this name."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, rest = text.split(begin)
    return f"{before}{begin}\n{content}\n{end}{rest.split(end)[1]}"


def main() -> int:
    readme = ROOT / "README.md"
    text = readme.read_text()
    new = filled(filled(text, "results", results()), "reliability", reliability())
    if "--check" in sys.argv[1:]:
        print(
            "README's tables are up to date" if new == text else "old tables: run python benchmarks/readme.py"
        )
        return int(new != text)
    readme.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
