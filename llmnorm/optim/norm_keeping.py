"""Matrices that return to the Frobenius norm they started with: the rule `normalize_and_project`.

    W <- rho W / ||W||_F,   rho = ||W_0||_F           hidden matrices and the embedding, after every step

Normalization and effective learning rates in reinforcement learning (NaP, arXiv 2407.01800). Where the
function does not depend on the length of W, the projection changes nothing but the size of later updates
relative to W, which a growing W would shrink; the learning-rate schedule alone decides then. The output layer
is left free, as are vectors.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from llmnorm.optim.matrix import local
from llmnorm.optim.roles import Role, route_parameters

KEPT = (Role.HIDDEN_MATRIX, Role.EMBEDDING)


@torch.no_grad()
def keep_norms(model: nn.Module) -> None:
    """Scale the matrices of `model` to the norms in its buffer `initial_norms` (number of parameters,) in the
    order of `parameters()`; the first time, when it has nan there, remember the norms as they are.

    Norms are summed in fp64; of sharded matrices only a number travels. The buffer is saved with the weights.
    """
    module = getattr(model, "module", model)
    targets: Tensor = module.initial_norms  # type: ignore[assignment]
    places = {parameter: place for place, parameter in enumerate(module.parameters())}
    for _, parameter, role in route_parameters(model):
        if role not in KEPT:
            continue
        place, norm = places[parameter], frobenius_norm(parameter.detach())
        target = torch.where(targets[place].isnan(), norm.to(targets), targets[place])
        targets[place] = target
        factor = target.to(norm) / norm.clamp_min(torch.finfo(torch.float64).tiny)
        weight = local(parameter.detach())
        weight.copy_(weight * factor)


def frobenius_norm(matrix: Tensor) -> Tensor:
    """||W||_F (), in fp64; of a DTensor every process gets that of the whole, one number each way."""
    square = matrix.double().square().sum()
    return (square.full_tensor() if isinstance(square, DTensor) else square).sqrt()
