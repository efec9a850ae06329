"""The residual stream, layer by layer: its size, how far each layer turns it, its massive activations.

x_0 is the input of the first layer and x_l the output of layer l, before the final norm; d is the width.

    second moment      E_t ms(x_l,t)                  ms(x) = (1/d) sum_i x_i^2;  rms = its square root
    variance           E_t [ms(x_l,t) - mean(x_l,t)^2]
    angular distance   E_s (1/pi) arccos cos(x_k,s , x_l,s)      s: the last token of each sequence
    block influence    E_t [1 - cos(x_{l-1},t , x_l,t)]
    relative update    E_t ||x_l,t - x_{l-1},t|| / ||x_{l-1},t||
    massive            |x| > 100 and |x| >= 1000 median |x|, the median over a sequence's x_l

t runs over all tokens. Sources: variance, The Curse of Depth (arXiv 2502.05795); angular distance, The
Unreasonable Ineffectiveness of the Deeper Layers (arXiv 2403.17887); block influence, ShortGPT (arXiv
2403.03853); massive activations, Massive Activations in Large Language Models (arXiv 2402.17762).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmnorm.evaluation.tally import Gather, Tally, alone
from llmnorm.modeling.zero_mean import decompress, unwiden

MASSIVE_SIZE, MASSIVE_RATIO = 100.0, 1000.0
POSITIONS_KEPT = 8


class StreamStatistics:
    """Sums the quantities above over the forward passes made inside `watching`."""

    def __init__(
        self, num_layers: int, device: torch.device, positions: bool = True, config: Any = None
    ) -> None:
        """positions: also note where massive activations are, which costs a synchronization. config: the
        model's, which says whether its stream is compressed."""
        points = num_layers + 1
        self.features = features_of(config)
        self.positions = positions
        self.tally = Tally(
            device,
            sums={
                "tokens": (1,),
                "sequences": (1,),
                "second_moment": (points,),
                "variance": (points,),
                "influence": (num_layers,),
                "relative_update": (num_layers,),
                "angle": (points, points),
                "massive_count": (points,),
            },
            maxima={"max_abs": (points,), "massive_ratio": (points,)},
        )
        self.massive: list[list[dict[str, Any]]] = [[] for _ in range(points)]
        self._sequences_before = 0
        self._previous: Tensor | None = None
        self._last_tokens: list[Tensor] = []

    @contextmanager
    def watching(self, blocks: Sequence[nn.Module]) -> Iterator[None]:
        """Observe every forward pass through `blocks`, whose outputs stay as they are."""

        def entered(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._begin(block_input(args, kwargs))

        handles = [blocks[0].register_forward_pre_hook(entered, with_kwargs=True)]
        for number, block in enumerate(blocks, start=1):

            def left(module: nn.Module, args: Any, output: Any, number: int = number) -> None:
                self._see(number, block_output(output))

            handles.append(block.register_forward_hook(left))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _begin(self, x: Tensor) -> None:
        self._sequences_before += len(self._last_tokens[0]) if self._last_tokens else 0
        self._last_tokens = []
        sums = self.tally.sums
        sums["tokens"] += x.shape[0] * x.shape[1]
        sums["sequences"] += x.shape[0]
        self._size(0, _wide(self.features(x)))

    def _see(self, number: int, x: Tensor) -> None:
        """x_l, l = `number`: [B, T, d]."""
        x, previous, sums = _wide(self.features(x)), self._previous, self.tally.sums
        assert previous is not None, "the first layer was not entered"
        turned = 1 - F.cosine_similarity(x, previous, dim=-1)
        sums["influence"][number - 1] += turned.sum(dtype=torch.float64)
        step = torch.linalg.vector_norm(x - previous, dim=-1) / torch.linalg.vector_norm(previous, dim=-1)
        sums["relative_update"][number - 1] += step.sum(dtype=torch.float64)
        self._size(number, x)
        if number == len(sums["second_moment"]) - 1:
            sums["angle"] += angular_distances(torch.stack(self._last_tokens, dim=1)).sum(0)
            self._previous = None

    def _size(self, number: int, x: Tensor) -> None:
        sums = self.tally.sums
        squares = torch.linalg.vector_norm(x, dim=-1).square() / x.shape[-1]
        sums["second_moment"][number] += squares.sum(dtype=torch.float64)
        sums["variance"][number] += x.var(dim=-1, correction=0).sum(dtype=torch.float64)
        self._find_massive(number, x.flatten(1).abs(), x)
        self._last_tokens.append(x[:, -1].double())
        self._previous = x

    def _find_massive(self, number: int, magnitude: Tensor, x: Tensor) -> None:
        median = magnitude.median(dim=1).values
        largest = magnitude.amax(dim=1)
        self.tally.raise_to("max_abs", number, largest.max())
        self.tally.raise_to("massive_ratio", number, (largest / median).max())
        massive = (magnitude > MASSIVE_SIZE) & (magnitude >= MASSIVE_RATIO * median[:, None])
        count = massive.sum()
        self.tally.sums["massive_count"][number] += count
        if not self.positions or not int(count):
            return
        rows, places = massive.nonzero(as_tuple=True)
        order = magnitude[rows, places].argsort(descending=True)[:POSITIONS_KEPT]
        found = [
            {
                "sequence": self._sequences_before + row,
                "position": place // x.shape[-1],
                "feature": place % x.shape[-1],
                "value": float(x[row].flatten()[place]),
            }
            for row, place in zip(rows[order].tolist(), places[order].tolist(), strict=True)
        ]
        kept = sorted(self.massive[number] + found, key=lambda one: -abs(one["value"]))
        self.massive[number] = kept[:POSITIONS_KEPT]

    def result(self, gather: Gather = alone) -> dict[str, Any]:
        """Plain lists: L+1 numbers for what x_0 ... x_L have, L for what layers 1 ... L do."""
        total = self.tally.total(gather)
        tokens, sequences = total["tokens"], total["sequences"]
        second_moment, angles = total["second_moment"] / tokens, total["angle"] / sequences
        return {
            "sequences": int(sequences),
            "tokens": int(tokens),
            "stream_second_moment": second_moment.tolist(),
            "stream_rms": second_moment.sqrt().tolist(),
            "stream_variance": (total["variance"] / tokens).tolist(),
            "angular_distance": angles.diagonal(1).tolist(),
            "angular_distance_matrix": angles.tolist(),
            "block_influence": (total["influence"] / tokens).tolist(),
            "relative_update": (total["relative_update"] / tokens).tolist(),
            "max_activation": total["max_abs"].tolist(),
            "massive_ratio": total["massive_ratio"].tolist(),
            "massive_count": [int(count) for count in total["massive_count"]],
            "massive_positions": self.massive if self.positions else None,
        }


def block_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The residual stream that a call of a block was given."""
    return args[0] if args else kwargs["hidden_states"]


def block_output(output: Any) -> Tensor:
    """The residual stream that a block returned, alone or before other things."""
    return output[0] if isinstance(output, tuple) else output


def features_of(config: Any) -> Callable[[Tensor], Tensor]:
    """What gives the stream all its d features: Pre-CRMSNorm computes d - 1 of them, and zeros behind."""
    if not getattr(config, "is_compressed", False):
        return lambda x: x
    width: int = config.stream_width
    return lambda x: decompress(unwiden(x, width))


def _wide(x: Tensor) -> Tensor:
    x = x.detach()
    return x.to(torch.promote_types(x.dtype, torch.float32))


def angular_distances(x: Tensor) -> Tensor:
    """(1/pi) arccos cos(x_k, x_l) of all pairs: x [B, L+1, d] fp64 -> [B, L+1, L+1], 0 on the diagonal."""
    directions = F.normalize(x, dim=-1)
    angles = torch.arccos((directions @ directions.transpose(-1, -2)).clamp(-1.0, 1.0)) / math.pi
    angles.diagonal(dim1=-2, dim2=-1).zero_()
    return angles


def growth(variance: Sequence[float]) -> dict[str, dict[str, float]] | None:
    """Least-squares fits of ln v_l over l = 1 ... L: on l (exponential growth) and on ln l (a power law).

    variance: v_1 ... v_L. Each fit has slope and r2 (1: exact); None for fewer than 3 layers or a v_l that is
    not positive.
    """
    if len(variance) < 3 or not all(v > 0 and math.isfinite(v) for v in variance):
        return None
    depth = torch.arange(1, len(variance) + 1, dtype=torch.float64)
    y = torch.tensor(variance, dtype=torch.float64).log()
    return {"exponential": _line(depth, y), "power": _line(depth.log(), y)}


def _line(x: Tensor, y: Tensor) -> dict[str, float]:
    x, y = x - x.mean(), y - y.mean()
    slope = (x @ y) / (x @ x)
    spread = y @ y
    r2 = 1 - (y - slope * x).square().sum() / spread if spread > 0 else torch.ones(())
    return {"slope": float(slope), "r2": float(r2)}
