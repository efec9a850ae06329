"""The mean-projected step: AdamW, or SGD, on a recentered Pre-RMSNorm as if it were the Pre-LN it came from.

With P = I - 11^T / d, W the weights of Pre-LN and W~ = P W those of the recentered model, over the matrices
and biases that write to the residual stream:

    g <- P g        before clipping, so that the global norm is Pre-LN's, whose gradients have no mean
    W~ <- P W~      after the step (`constraints.project_weights`); as decay keeps a mean of 0, that is P
                    applied to the update

Pre-LN's gradients are P g, so moments, whatever else is computed from gradients alone, and decoupled weight
decay are Pre-LN's, and W~ stays P W (Pre-RMSNorm and Pre-CRMSNorm Transformers, arXiv 2305.14858, whose code
recenters the weights in every forward pass instead). Projecting gradients alone is not enough: Adam's update
of a gradient without mean has one. A method that reads weights (LAMB's trust ratio, AdamP, LAWN) reads others
than Pre-LN's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llmnorm.optim.matrix import gather, local


@torch.no_grad()
def project_gradients(model: nn.Module) -> None:
    """g <- P g in place for the parameters of every module with a true attribute `zero_mean_outputs`.

    Their first dimension is the one whose mean goes, in at least fp32. Training calls it before clipping;
    with a loop of one's own:

        loss.backward(); project_gradients(model); clip; optimizer.step(); project_weights(model)
    """
    for parameter in mean_free_parameters(model):
        if parameter.grad is not None:
            project_gradient(parameter.grad)


def mean_free_parameters(model: nn.Module) -> dict[nn.Parameter, None]:
    """The parameters whose gradients have no mean over their first dimension once they are projected.

    In the model's order, which the messages of sharded ones need on every process.
    """
    owners = (module for module in model.modules() if getattr(module, "zero_mean_outputs", False))
    return dict.fromkeys(parameter for module in owners for parameter in module.parameters(recurse=False))


@torch.no_grad()
def project_gradient(grad: Tensor) -> None:
    """g <- P g in place."""
    # The sum of a DTensor's rows is one message of a row's length, however it is sharded.
    total = gather(grad.sum(0, dtype=torch.promote_types(grad.dtype, torch.float32)))
    part = local(grad)
    part.copy_(part - total / grad.shape[0])
