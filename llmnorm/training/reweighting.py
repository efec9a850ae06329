"""Loss-based reweighting of samples: "Dynamic Loss-Based Sample Reweighting for Improved Large Language Model
Pretraining" (arXiv 2502.06733).

    h_i = (2 l_i - (l_max + l_min)) / max(l_max - l_min, 1e-6)     in [-1, 1], l_i = mean loss of sample i
    linear: f = min(h + 1, 1)     quadratic: f = 1 - h^2     extremes: f = |h|
    w = softmax(f / r)            over the samples of the GLOBAL batch, taken as constants
    loss = (1/n) sum_i N w_i sum_t -ln p(y_it)

with N samples and n valid targets in all. For samples of equal length the loss is sum_i w_i l_i, as in the
paper; for others each token keeps its share, so that uniform weights give the unweighted loss exactly. A
sample without valid targets has no loss and counts nowhere. The paper's delta is 1: only f / r matters.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from llmnorm.config import LossReweightingSection
from llmnorm.training.processes import Processes

STRATEGIES: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda h: (h + 1.0).clamp(max=1.0),
    "quadratic": lambda h: 1.0 - h.square(),
    "extremes": lambda h: h.abs(),
}
SMALLEST_SPREAD = 1e-6


class SampleWeights(NamedTuple):
    """multipliers: N w_i, float64 [N], 1 where all weights are equal and 0 without valid targets.

    entropy: -sum w ln w / ln N in [0, 1], a float64 scalar; 1 for uniform weights.
    """

    multipliers: Tensor
    entropy: Tensor


def sample_weights(losses: Tensor, counts: Tensor, strategy: str, temperature: float) -> SampleWeights:
    """The weights of a global batch.

    losses: float64 [N], each sample's sum over its valid targets. counts: [N], how many those are.
    """
    valid = counts > 0
    if not valid.any():  # nothing to weigh: the loss is 0 / 0, which the guards skip
        return SampleWeights(torch.ones_like(losses), losses.new_ones(()))
    means = torch.where(valid, losses / counts.clamp(min=1), torch.nan)
    known = means[valid]
    lowest, highest = known.min(), known.max()
    h = (2.0 * known - (highest + lowest)) / (highest - lowest).clamp(min=SMALLEST_SPREAD)
    f = STRATEGIES[strategy](h) / temperature
    odds = (f - f.max()).exp()
    multipliers = torch.zeros_like(losses)
    multipliers[valid] = odds / odds.mean()
    w = odds / odds.sum()
    entropy = torch.special.entr(w).sum() / max(math.log(len(known)), math.log(2))
    return SampleWeights(multipliers, entropy if len(known) > 1 else torch.ones_like(entropy))


def global_weights(
    losses: Tensor, counts: Tensor, options: LossReweightingSection, processes: Processes
) -> tuple[Tensor, Tensor]:
    """This process's multipliers [K] of its own K samples, and the entropy of all processes' weights.

    losses, counts: [K], of this process; every process has as many.
    """
    everyone = losses.new_zeros(processes.world_size, 2, len(losses), dtype=torch.float64)
    everyone[processes.rank] = torch.stack((losses.double(), counts.double()))
    all_losses, all_counts = processes.sum(everyone).transpose(0, 1).flatten(1)
    weights = sample_weights(all_losses, all_counts, options.strategy, options.temperature)
    return weights.multipliers.view(processes.world_size, -1)[processes.rank], weights.entropy
