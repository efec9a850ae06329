"""The base of the low-rank methods: their shared options, the default rank, and what a rank must obey."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from llmnorm.errors import UserError
from llmnorm.int8 import Int8Weight
from llmnorm.optim.lowrank import projects_right, rank_of
from llmnorm.optim.matrix_optimizer import MatrixOptimizer
from llmnorm.optim.option_ranges import Options
from llmnorm.optim.roles import Role
from llmnorm.optim.rules import Hyper


class SubspaceOptions(Options, total=False):
    """Options of every method that projects gradients; `LowRankOptimizer` says what they mean."""

    side: str
    projection: str
    moments: str
    stagger: bool
    lazy_refresh: bool
    state_bits: int
    projection_bits: int
    weights: str


class LowRankOptimizer(MatrixOptimizer):
    """A method that keeps Adam's moments of projected gradients; see `lowrank.py` for the equations.

    rank: r, clamped to the smaller side of each matrix where it is not given; null: a quarter of the largest
    smaller side, which is hidden_size / 4 in a LLaMA. update_proj_gap: steps between refreshes. side: std
    (the smaller dimension, as released), auto (the side with less state) or right. projection: svd, gram (by
    eigenvectors of G^T G), randomized, power (warm power iteration) or random (not stored). moments: what a
    refresh does to them: keep, as released, transport into the new coordinates, or reset. stagger: matrices
    take turns to refresh. lazy_refresh: the gap doubles where the subspace stands still. state_bits: 32 (the
    dtype that state_dtype says), 8 or 4. projection_bits: 32, or 4 for a packed INT4 basis. weights
    (galore, fira, apollo): param, or int8 for hidden matrices in INT8, see `int8_weights.py`. seed: of random
    numbers.

    Raises `UserError` for a rank above the smaller side of a matrix, naming it, and for int8 with weights
    that `quantize_weights` has not met.
    """

    host_state: ClassVar[frozenset[str]] = MatrixOptimizer.host_state | {
        "refresh_gap",
        "next_refresh",
        "overlaps",
    }
    weight_block: ClassVar[int] = 256  # numbers of an INT8 weight that share a range
    # Whether the equations hold for orthonormal bases only.
    orthonormal: ClassVar[bool] = False
    # Whether an update reads nothing of a gradient but its projection, so that sums of those serve it.
    sums_projections: ClassVar[bool] = False
    subspace_defaults: ClassVar[SubspaceOptions] = SubspaceOptions(
        side="std",
        projection="svd",
        moments="keep",
        stagger=False,
        lazy_refresh=False,
        state_bits=32,
        projection_bits=32,
    )

    @classmethod
    def shared_options(cls) -> dict[str, Any]:
        return {**super().shared_options(), **cls.subspace_defaults}

    @property
    def default_rank(self) -> int:
        """A quarter of the largest smaller side of the hidden matrices."""
        smaller = [min(p.shape[-2:]) for group in self._hidden() for p in group["params"]]
        return max(1, max(smaller, default=4) // 4)

    def context(self, group: Hyper) -> dict[str, Any]:
        return {"rank": group["rank"] or self.default_rank}

    def projected_bytes(self, group: Hyper, parameter: Tensor) -> int:
        """Bytes of R, which is fp32 or wider, of a hidden matrix."""
        hyper = {**group, **self.context(group)}
        m, n = parameter.shape[-2:]
        other = m if projects_right((m, n), hyper) else n
        stacked = parameter.numel() // (m * n)
        size = torch.promote_types(parameter.dtype, torch.float32).itemsize
        return stacked * other * rank_of((m, n), hyper) * size

    def _hidden(self) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if group["role"] == Role.HIDDEN_MATRIX]

    def _check_group(self, group: Hyper) -> None:
        super()._check_group(group)
        if group["role"] != Role.HIDDEN_MATRIX:
            return
        names = group.get("param_names") or [f"parameter {i}" for i in range(len(group["params"]))]
        for name, parameter in zip(names, group["params"], strict=True):
            if group.get("weights") == "int8" and not isinstance(parameter, Int8Weight):
                raise UserError(
                    f"optimizer.weights=int8 needs INT8 weights, and {name} is a plain tensor; call "
                    "llmnorm.optim.quantize_weights(model) before, or use create_optimizer, which does"
                )
            m, n = parameter.shape[-2:]
            if group["rank"] is not None and group["rank"] > min(m, n):
                raise UserError(
                    f"optimizer.rank={group['rank']} exceeds min(out, in)={min(m, n)} of {name}; lower "
                    "optimizer.rank, or leave it null for hidden_size / 4, clamped per matrix"
                )
        if group.get("projection") == "random":
            self._check_random(group)

    def _check_random(self, group: Hyper) -> None:
        if self.orthonormal:
            raise UserError(
                f"optimizer.projection=random has no orthonormal rows, which {type(self).__name__} needs; "
                "choose svd, gram, randomized or power"
            )
        for key, idle in (("moments", "keep"), ("lazy_refresh", False), ("projection_bits", 32)):
            if group[key] != idle:
                raise UserError(
                    f"optimizer.{key}={group[key]} would do nothing with optimizer.projection=random, whose "
                    f"basis is drawn and not kept; leave it at {idle}, or choose another projection"
                )
