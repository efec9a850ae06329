"""LAWN: weights on spheres, Adam in the tangent (Logit Attenuating Weight Normalization, arXiv 2108.05839).

    first `free_steps` updates: AdamW; then c = ||W|| of every matrix is frozen and
    g <- g - <g, W^> W^                W^ = W / ||W||
    u = m^ / (sqrt(v^) + eps) on g,    u <- u - <u, W^> W^
    W <- c (W - lr u) / ||W - lr u||

No weight decay on the sphere. The authors warm the learning rate up again at the switch; that is the
schedule's business.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor

from llmnorm.optim.matrix import State
from llmnorm.optim.matrix_optimizer import MatrixOptimizer
from llmnorm.optim.normalization import inner, squared_norm
from llmnorm.optim.option_ranges import Options
from llmnorm.optim.roles import Role
from llmnorm.optim.row_shards import Parts, by_rows, sums
from llmnorm.optim.rules import ADAMW, Hyper, Rule, adam_direction, wide
from llmnorm.optim.update_size import ADAM_LIKE


@by_rows(whole_state=["norm"])
def lawn_update(grad: Tensor, state: State, hyper: Hyper, weight: Tensor) -> Parts:
    """AdamW while free, then the tangent part of Adam on tangent gradients; freezes `norm` at the switch."""
    g, w = wide(grad), wide(weight)
    square, along = yield sums(squared_norm(w), inner(g, w))
    length = square.sqrt()
    # 0 means free. It is held from the first step on, so that the state never changes its size.
    norm = state.setdefault("norm", torch.zeros_like(length))
    done = int(state["step"].item()) if "step" in state else 0
    if done < hyper["free_steps"]:
        return adam_direction(g.to(grad.dtype), state, hyper) + hyper["weight_decay"] * w
    norm.copy_(torch.where(norm > 0, norm, length))
    length = length.clamp(min=torch.finfo(w.dtype).tiny)
    unit = w / length
    u = adam_direction((g - along / length * unit).to(grad.dtype), state, hyper)
    (along,) = yield sums(inner(u, unit))
    return u - along * unit


@by_rows(whole_state=["norm"])
def onto_sphere(weight: Tensor, state: State) -> Parts:
    """norm W / ||W|| once the norm is frozen."""
    w = wide(weight)
    (square,) = yield sums(squared_norm(w))
    norm, length = state["norm"], square.sqrt()
    return torch.where((norm > 0) & (length > 0), w * (norm / length), w).to(weight.dtype)


SPHERE = Rule("lawn", lawn_update, ADAM_LIKE, reads_weight=True, decays=True, project=onto_sphere)


class LAWN(MatrixOptimizer):
    """LAWN with Adam on every matrix, AdamW on vectors. `free_steps` 0 freezes the norms of the start."""

    rules: ClassVar[Mapping[str, Rule]] = {
        Role.HIDDEN_MATRIX: SPHERE,
        Role.EMBEDDING: SPHERE,
        Role.LM_HEAD: SPHERE,
        Role.VECTOR: ADAMW,
    }

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        free_steps: int = 0,
        **shared: Unpack[Options],
    ):
        super().__init__(
            params, lr, weight_decay, {"betas": betas, "eps": eps, "free_steps": free_steps}, shared
        )
