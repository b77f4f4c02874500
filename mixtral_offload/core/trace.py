"""A record of what a run routed: experts of every token, hits, copies, predictions, times.

Arrays and their file; no models, no caches. `analysis/recorder.py` fills a trace, `analysis/replay.py`
replays it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import load_file, save

from mixtral_offload.errors import OptionError
from mixtral_offload.system.files import replace_file

if TYPE_CHECKING:
    import pandas

HIT, MISS, PREFETCHED, COMPUTED = range(4)
OUTCOMES = ("hit", "miss", "prefetched", "computed by the CPU")
FORMAT = "mixtral_offload.RoutingTrace/3"


@dataclass
class RoutingTrace:
    """N tokens in P passes through L MoE layers, k experts each. Layers are numbered 0 .. L-1.

    U uses, one per expert that a pass needs in a layer; W copies for wrong predictions; G predictions,
    whether or not they led to a copy. Each group is in the order of its events. Times are the host's, in
    seconds from the start: on CUDA with pinned memory, a copy ends when it is enqueued, and waits are 0.

    Attributes:
        tokens: int64 `[N]`, ids.
        passes: int32 `[N]`, the pass of each token; a prompt's tokens share one.
        experts: int16 `[N, L, k]`, as the router gave them.
        weights: float32 `[N, L, k]`, as the router gave them.
        use_pass: int32 `[U]`.
        use_layer: int32 `[U]`.
        use_expert: int32 `[U]`.
        use_outcome: uint8 `[U]`, HIT, MISS, PREFETCHED or COMPUTED (a miss that the CPU computed).
        use_wait_s: float64 `[U]`, how long the host waited for the expert.
        use_at_s: float64 `[U]`, when the expert began to run.
        use_bytes: int64 `[U]`, bytes copied.
        use_copy_s: float64 `[U, 2]`, begin and end of the copy; nan if there was none.
        wasted_pass: int32 `[W]`.
        wasted_layer: int32 `[W]`.
        wasted_expert: int32 `[W]`.
        wasted_bytes: int64 `[W]`, bytes copied.
        wasted_copy_s: float64 `[W, 2]`, begin and end of the copy.
        predicted_pass: int32 `[G]`, the pass in which, and for which, the prediction was made.
        predicted_from: int32 `[G]`, the layer after which it was made; -1: from the embeddings.
        predicted_layer: int32 `[G]`, the layer that it is for.
        predicted_expert: int32 `[G]`.
        predicted_rank: int32 `[G]`, 0 for the most probable.
        spans: float64 `[P, L, 2]`, begin and end of the experts' part of each layer.
        settings: Of the run: model, slots by layer, residents, policy, prefetch, ...
        counters: The run's `CacheStats`.
        pieces: The tokens as text.
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
    settings: dict[str, Any] = field(default_factory=dict)
    counters: dict[str, Any] = field(default_factory=dict)
    pieces: list[str] = field(default_factory=list)

    @property
    def n_tokens(self) -> int:
        return len(self.tokens)

    @property
    def n_passes(self) -> int:
        return len(self.spans)

    @property
    def n_layers(self) -> int:
        """Number of MoE layers."""
        return self.experts.shape[1]

    @property
    def top_k(self) -> int:
        return self.experts.shape[2]

    @property
    def n_experts(self) -> int:
        """Experts per layer."""
        return self.settings["n_experts"]

    @property
    def expert_bytes(self) -> int:
        """Bytes that the copy of one expert moves."""
        return self.settings["expert_bytes"]

    def outcomes(self) -> np.ndarray:
        """Return the outcome for each token, layer and choice: uint8 `[N, L, k]`."""
        by_expert = np.full((self.n_passes, self.n_layers, self.n_experts), HIT, np.uint8)
        by_expert[self.use_pass, self.use_layer, self.use_expert] = self.use_outcome
        layers = np.arange(self.n_layers)[None, :, None]
        return by_expert[self.passes[:, None, None], layers, self.experts]

    def usage(self, tokens: slice | np.ndarray = slice(None)) -> np.ndarray:
        """Count how often these tokens chose each expert: int64 `[L, n_experts]`."""
        chosen = self.experts[tokens].swapaxes(0, 1).reshape(self.n_layers, -1)
        return np.stack([np.bincount(of_layer, minlength=self.n_experts) for of_layer in chosen])

    def rows(self) -> dict[str, np.ndarray]:
        """Return a long table, one row per token, layer and choice: column name -> array `[N * L * k]`."""
        token, layer, choice = (axis.ravel() for axis in np.indices(self.experts.shape))
        text = np.array(self.pieces, object)[token] if self.pieces else np.full(token.shape, "")
        return {
            "token": token,
            "id": self.tokens[token],
            "text": text,
            "pass": self.passes[token],
            "layer": np.array(self.settings["layers"])[layer],
            "choice": choice,
            "expert": self.experts.ravel(),
            "weight": self.weights.ravel(),
            "outcome": np.array(OUTCOMES)[self.outcomes().ravel()],
        }

    def to_pandas(self) -> pandas.DataFrame:
        """Return `rows` as a DataFrame.

        Raises:
            OptionError: If pandas is not installed.
        """
        try:
            import pandas
        except ImportError:
            raise OptionError(
                "pandas is not installed", hint="pip install pandas, or use trace.rows()"
            ) from None
        return pandas.DataFrame(self.rows())

    @classmethod
    def from_routing(
        cls,
        experts: np.ndarray,
        weights: np.ndarray,
        n_experts: int,
        expert_bytes: int = 0,
        predictions: np.ndarray | None = None,
        **settings: Any,
    ) -> RoutingTrace:
        """Make a trace of known routing, as if generated token by token with all experts cached.

        Args:
            experts: int `[N, L, k]`.
            weights: float `[N, L, k]`.
            predictions: int `[N, L, D, n]`, the n experts predicted for each token and layer at look-ahead 1
                .. D, the most probable first. Those from before the embeddings are ignored.

        Raises:
            OptionError: If predictions have another shape or name impossible experts.
        """
        n, n_layers = experts.shape[:2]
        number, layer = (axis.ravel().astype(np.int32) for axis in np.indices(experts.shape)[:2])
        zeros, nothing = np.zeros(len(number)), np.zeros(0, np.int32)
        run = {"n_experts": n_experts, "expert_bytes": expert_bytes, "layers": list(range(n_layers))}
        run |= {"slots": [n_experts] * n_layers, "resident": [[]] * n_layers}
        run |= {"policy": "lru", "shared_slots": False}
        return cls(
            tokens=np.zeros(n, np.int64),
            passes=np.arange(n, dtype=np.int32),
            experts=experts.astype(np.int16),
            weights=weights.astype(np.float32),
            use_pass=number,
            use_layer=layer,
            use_expert=np.sort(experts, -1).ravel().astype(np.int32),
            use_outcome=zeros.astype(np.uint8),
            use_wait_s=zeros,
            use_at_s=zeros,
            use_bytes=zeros.astype(np.int64),
            use_copy_s=np.full((len(number), 2), np.nan),
            wasted_pass=nothing,
            wasted_layer=nothing,
            wasted_expert=nothing,
            wasted_bytes=nothing.astype(np.int64),
            wasted_copy_s=np.zeros((0, 2)),
            **_predicted_columns(predictions, experts.shape, n_experts),
            spans=np.zeros((n, n_layers, 2)),
            settings=run | settings,
        )

    def save(self, path: str | Path) -> None:
        """Write one safetensors file: the arrays, and the rest as JSON in its metadata."""
        held = vars(self).items()
        arrays = {name: np.ascontiguousarray(of) for name, of in held if isinstance(of, np.ndarray)}
        rest = {name: json.dumps(getattr(self, name)) for name in ("settings", "counters", "pieces")}
        replace_file(path, save(arrays, metadata={"format": FORMAT, **rest}))

    @classmethod
    def load(cls, path: str | Path) -> RoutingTrace:
        """Read a file that `save` wrote.

        Raises:
            OptionError: If the file cannot be read or is no trace.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), "numpy") as file:
                metadata = file.metadata() or {}
            arrays: dict[str, Any] = load_file(str(path))
        except (OSError, SafetensorError) as error:
            raise OptionError("cannot read a trace", path=path, found=error) from error
        wanted = {entry.name for entry in fields(cls)} - {"settings", "counters", "pieces"}
        if metadata.get("format") != FORMAT or set(arrays) != wanted:
            raise OptionError("not a routing trace", path=path, expected=FORMAT, found=metadata.get("format"))
        rest = {name: json.loads(metadata[name]) for name in ("settings", "counters", "pieces")}
        return cls(**arrays, **rest)


def _predicted_columns(
    predictions: np.ndarray | None, routed: tuple[int, ...], n_experts: int
) -> dict[str, Any]:
    """The columns `predicted_*` of `from_routing`'s predictions; routed: the shape of its experts."""
    found = np.zeros((*routed[:2], 0, 0), int) if predictions is None else np.asarray(predictions)
    if found.ndim != 4 or found.shape[:2] != routed[:2]:
        expected = f"[{routed[0]}, {routed[1]}, look-aheads, experts]"
        raise OptionError("predictions of another shape", expected=expected, found=list(found.shape))
    if found.size and not 0 <= found.min() <= found.max() < n_experts:
        between = f"{found.min()} to {found.max()}"
        raise OptionError("impossible predictions", expected=f"experts 0 to {n_experts - 1}", found=between)
    number, layer, ahead, rank = (axis.ravel() for axis in np.indices(found.shape))
    made_after = layer - ahead - 1
    order = np.lexsort((rank, layer, made_after, number))
    order = order[made_after[order] >= -1]
    columns = {"pass": number, "from": made_after, "layer": layer, "expert": found.ravel(), "rank": rank}
    return {f"predicted_{name}": column[order].astype(np.int32) for name, column in columns.items()}
