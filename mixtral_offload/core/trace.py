"""What a run really routed: which experts every token used, what the cache held, what was copied and waited for.

Knows arrays and their file. Knows nothing of models or caches; `analysis/recorder.py` fills it, `analysis/replay.py` replays it,
`analysis/plots/routing.py` draws it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save

from mixtral_offload.errors import OptionError
from mixtral_offload.system.files import replace_file

HIT, MISS, PREFETCHED = 0, 1, 2
OUTCOMES = ("hit", "miss", "prefetched")
FORMAT = "mixtral_offload.RoutingTrace/3"


@dataclass
class RoutingTrace:
    """N tokens in P passes through L layers, k experts each; layers by number 0..L-1, times in seconds from the start.

    tokens: int64 [N], ids. passes: int32 [N], the pass each token went through (a prompt's tokens share one).
    experts: int16 [N, L, k] and weights: float32 [N, L, k], as the router gave them.
    use_*: one entry per expert needed by one pass through one layer, in order: use_pass, use_layer, use_expert: int32;
    use_outcome: uint8 HIT, MISS or PREFETCHED (a guess had started its copy); use_wait_s: float64, how long the model
    stood still for it; use_at_s: float64, when it began to run; use_bytes: int64 copied; use_copy_s: float64 [., 2],
    begin and end of the copy, nan if none.
    wrong_*: one entry per guess that was not used: wasted_pass, wasted_layer, wasted_expert, wasted_bytes, wasted_copy_s.
    guess_*: int32 [G], one entry per guess that was asked for, whether or not a copy came of it: predicted_pass, the pass in
    (and for) which it was made; predicted_from, the layer after which (-1: from the embeddings); predicted_layer and predicted_expert,
    what was guessed; predicted_rank, 0 for the likeliest. In the order in which they were made.
    spans: float64 [P, L, 2], begin and end of the experts' part of each layer.
    Times are the host's: on CUDA with pinned memory, copies end when they are asked for, and nothing is waited for.
    settings: of the run (model, slots by layer, residents, policy, prefetch ...); counters: its CacheStats.
    pieces: the tokens as text.
    """

    tokens: np.ndarray
    passes: np.ndarray
    experts: np.ndarray
    weights: np.ndarray
    use_pass: np.ndarray
    use_layer: np.ndarray
    use_expert: np.ndarray
    use_outcome: np.ndarray
    use_wait_s: np.ndarray
    use_at_s: np.ndarray
    use_bytes: np.ndarray
    use_copy_s: np.ndarray
    wasted_pass: np.ndarray
    wasted_layer: np.ndarray
    wasted_expert: np.ndarray
    wasted_bytes: np.ndarray
    wasted_copy_s: np.ndarray
    predicted_pass: np.ndarray
    predicted_from: np.ndarray
    predicted_layer: np.ndarray
    predicted_expert: np.ndarray
    predicted_rank: np.ndarray
    spans: np.ndarray
    settings: dict = field(default_factory=dict)
    counters: dict = field(default_factory=dict)
    pieces: list[str] = field(default_factory=list)

    @property
    def n_tokens(self) -> int:
        return len(self.tokens)

    @property
    def n_passes(self) -> int:
        return len(self.spans)

    @property
    def n_layers(self) -> int:
        return self.experts.shape[1]

    @property
    def top_k(self) -> int:
        return self.experts.shape[2]

    @property
    def n_experts(self) -> int:
        return self.settings["n_experts"]

    @property
    def expert_bytes(self) -> int:
        """What one expert's copy moves."""
        return self.settings["expert_bytes"]

    def outcomes(self) -> np.ndarray:
        """HIT, MISS or PREFETCHED for each token, layer and choice: uint8 [N, L, k]."""
        by_expert = np.full((self.n_passes, self.n_layers, self.n_experts), HIT, np.uint8)
        by_expert[self.use_pass, self.use_layer, self.use_expert] = self.use_outcome
        layers = np.arange(self.n_layers)[None, :, None]
        return by_expert[self.passes[:, None, None], layers, self.experts]

    def usage(self, tokens: slice | np.ndarray = slice(None)) -> np.ndarray:
        """How often these tokens chose each expert: int64 [L, E]."""
        chosen = self.experts[tokens]
        return np.stack(
            [
                np.bincount(chosen[:, layer].ravel(), minlength=self.n_experts)
                for layer in range(self.n_layers)
            ]
        )

    def rows(self) -> dict[str, np.ndarray]:
        """A long table, one row per token, layer and choice: column name -> array [N * L * k]."""
        shape = self.experts.shape
        token, layer, choice = (axis.ravel() for axis in np.indices(shape))
        return {"token": token, "id": self.tokens[token], "text": np.array(self.pieces, object)[token] if self.pieces else np.full(token.shape, ""),
                "pass": self.passes[token], "layer": np.array(self.settings["layers"])[layer], "choice": choice, "expert": self.experts.ravel(),
                "weight": self.weights.ravel(), "outcome": np.array(OUTCOMES)[self.outcomes().ravel()]}  # fmt: skip

    def to_pandas(self):
        """`rows` as a pandas DataFrame; raises OptionError where pandas is not installed."""
        try:
            import pandas
        except ImportError:
            raise OptionError(
                "pandas is not installed", hint="pip install pandas, or use trace.rows()"
            ) from None
        return pandas.DataFrame(self.rows())

    @classmethod
    def from_routing(
        cls, experts: np.ndarray, weights: np.ndarray, n_experts: int, expert_bytes: int = 0,
        guesses: np.ndarray | None = None, **settings,
    ) -> RoutingTrace:  # fmt: skip
        """A trace of known routing, as if generated token by token: experts and weights [N, L, k]; nothing was copied.

        guesses: int [N, L, D, n], the n experts guessed for token, layer and look-ahead 1..D, the likeliest first; those
        of a look-ahead that reaches back beyond the embeddings are not looked at. Raises OptionError for another shape.
        """
        n, n_layers = experts.shape[:2]
        uses = np.sort(experts, -1).ravel()
        number, layer = (axis.ravel() for axis in np.indices(experts.shape)[:2])
        zeros, none, nothing = np.zeros(len(uses)), np.full((len(uses), 2), np.nan), np.zeros(0, np.int32)
        run = {"n_experts": n_experts, "expert_bytes": expert_bytes, "layers": list(range(n_layers)), "slots": [n_experts] * n_layers,
               "resident": [[]] * n_layers, "policy": "lru", "shared_slots": False, **settings}  # fmt: skip
        return cls(
            tokens=np.zeros(n, np.int64), passes=np.arange(n, dtype=np.int32), experts=experts.astype(np.int16),
            weights=weights.astype(np.float32), use_pass=number.astype(np.int32), use_layer=layer.astype(np.int32),
            use_expert=uses.astype(np.int32), use_outcome=np.zeros(len(uses), np.uint8), use_wait_s=zeros, use_at_s=zeros,
            use_bytes=zeros.astype(np.int64), use_copy_s=none, wasted_pass=nothing, wasted_layer=nothing, wasted_expert=nothing,
            wasted_bytes=nothing.astype(np.int64), wasted_copy_s=np.zeros((0, 2)),
            **_predicted_columns(guesses, experts.shape, n_experts), spans=np.zeros((n, n_layers, 2)), settings=run,
        )  # fmt: skip

    def save(self, path: str | Path) -> None:
        """One safetensors file: the arrays, and the rest as JSON in its metadata."""
        arrays = {
            name: np.ascontiguousarray(value)
            for name, value in vars(self).items()
            if isinstance(value, np.ndarray)
        }
        rest = {name: json.dumps(getattr(self, name)) for name in ("settings", "counters", "pieces")}
        replace_file(path, save(arrays, metadata={"format": FORMAT, **rest}))

    @classmethod
    def load(cls, path: str | Path) -> RoutingTrace:
        """Raises OptionError for a file that is not a trace."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), "numpy") as file:
                metadata = file.metadata() or {}
            arrays = load_file(str(path))
        except (OSError, SafetensorError) as error:
            raise OptionError("cannot read a trace", path=path, found=error) from error
        wanted = {entry.name for entry in fields(cls)} - {"settings", "counters", "pieces"}
        if metadata.get("format") != FORMAT or set(arrays) != wanted:
            raise OptionError("not a routing trace", path=path, expected=FORMAT, found=metadata.get("format"))
        rest = {name: json.loads(metadata[name]) for name in ("settings", "counters", "pieces")}
        return cls(**arrays, **rest)


def _predicted_columns(
    guesses: np.ndarray | None, routed: tuple[int, ...], n_experts: int
) -> dict[str, np.ndarray]:
    """The columns guess_* of guesses [N, L, D, n] (see `from_routing`); routed: the shape [N, L, k] of the experts."""
    guesses = np.zeros((*routed[:2], 0, 0), int) if guesses is None else np.asarray(guesses)
    if guesses.ndim != 4 or guesses.shape[:2] != routed[:2]:
        raise OptionError("guesses of another shape", expected=f"[{routed[0]}, {routed[1]}, look-aheads, experts]",
                          found=list(guesses.shape))  # fmt: skip
    if guesses.size and not 0 <= guesses.min() <= guesses.max() < n_experts:
        raise OptionError("impossible guesses", expected=f"experts 0 to {n_experts - 1}",
                          found=f"{guesses.min()} to {guesses.max()}")  # fmt: skip
    number, layer, ahead, rank = (axis.ravel() for axis in np.indices(guesses.shape))
    made_after = layer - ahead - 1
    order = np.lexsort((rank, layer, made_after, number))
    order = order[made_after[order] >= -1]
    columns = {"pass": number, "from": made_after, "layer": layer, "expert": guesses.ravel(), "rank": rank}
    return {f"predicted_{name}": column[order].astype(np.int32) for name, column in columns.items()}
