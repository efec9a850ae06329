"""Lower bounds of Lipschitz constants, found by attack: what a certificate must never be below.

Every number reported is a ratio of two points, |F(x + h D) - F(x - h D)| / (2 h max_t ||D_t||), both in the
ball, from two forward passes in fp64; gradients only say where to look. At a point, the direction is found
by the power method for max_t ||.||_2: for output token i and dual vector w, D_t = g_t / ||g_t|| with g =
J_i^T w, then i, w from the output that moved most. The point then climbs along the gradient of the ratio,
and stays in the ball.

Shapes: N points attacked side by side, T tokens, D features in, O features out.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmnorm.modeling import LlmNormForCausalLM

REACH = 1e-5  # h over the ball's radius: fp64 rounding in the ratio is then about 1e-10
LARGEST_STEP, SMALLEST_STEP = 0.3, 0.01  # of the climb, over the ball's radius


class OutputNorm(NamedTuple):
    """A norm of changes [..., O] -> [...], and for each a vector whose product with it is that norm."""

    measure: Callable[[Tensor], Tensor]
    dual: Callable[[Tensor], Tensor]


def _direction(y: Tensor) -> Tensor:
    return y / torch.linalg.vector_norm(y, dim=-1, keepdim=True).clamp_min(1e-300)


def _pair(y: Tensor) -> Tensor:
    """e_a - e_b for the entry that rose most and the one that fell most."""
    w = torch.zeros_like(y)
    w.scatter_(-1, y.argmax(-1, keepdim=True), 1.0)
    return w.scatter_add_(-1, y.argmin(-1, keepdim=True), -torch.ones_like(y[..., :1]))


def _rms(y: Tensor) -> Tensor:
    return torch.linalg.vector_norm(y, dim=-1) / math.sqrt(y.shape[-1])


EUCLIDEAN = OutputNorm(lambda y: torch.linalg.vector_norm(y, dim=-1), _direction)
OUTPUT_NORMS = {
    "logit_difference": OutputNorm(lambda y: y.amax(-1) - y.amin(-1), _pair),
    "logits_rms": OutputNorm(_rms, _direction),
    "hidden_rms": OutputNorm(_rms, _direction),
}


def _tokens(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True)


def _into_ball(x: Tensor, radius: float) -> Tensor:
    return x * (radius / _tokens(x).clamp_min(radius))


def random_points(count: int, tokens: int, features: int, radius: float, seed: int) -> Tensor:
    """[count, tokens, features] in fp64: directions at random, a third each at the radius, at a tenth of it,
    and at lengths that differ by token.
    """
    generator = torch.Generator().manual_seed(seed)
    x = _direction(torch.randn(count, tokens, features, generator=generator, dtype=torch.float64)) * radius
    lengths = torch.rand(count, tokens, 1, generator=generator, dtype=torch.float64)
    lengths[0::3] = 1.0
    lengths[1::3] = 0.1
    return x * lengths


def random_ratio(
    function: Callable[[Tensor], Tensor], points: Tensor, output: OutputNorm = EUCLIDEAN
) -> float:
    """The largest ratio between each point and the next one, which are far apart."""
    with torch.no_grad():
        y = function(points)
        moved = output.measure(y - y.roll(1, 0)).amax(-1)
        return float((moved / _tokens(points - points.roll(1, 0)).amax((1, 2))).max())


def attacked_ratio(
    function: Callable[[Tensor], Tensor],
    points: Tensor,
    radius: float,
    output: OutputNorm = EUCLIDEAN,
    steps: int = 30,
    seed: int = 0,
) -> float:
    """The largest ratio found from `points` [N, T, D] on, fp64, in the ball of `radius`.

    function: [N, T, D] -> [N, T, O], differentiable once, each row by itself.
    """
    h = REACH * radius
    x = _into_ball(points, radius - h)
    rows = torch.arange(x.shape[0])
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        shape = function(x).shape
        w = output.dual(torch.randn(shape[0], shape[2], generator=generator, dtype=x.dtype).to(x))
    token = torch.arange(x.shape[0]).flip(0) % x.shape[1]
    token[0] = x.shape[1] - 1
    best = 0.0
    for step in range(steps):
        x.requires_grad_()
        y = function(x)[rows, token]
        (g,) = torch.autograd.grad((y * w).sum(), x)
        direction = g / _tokens(g).clamp_min(1e-300)
        moved = (function(x + h * direction) - function(x - h * direction)) / (2 * h)
        ratios = output.measure(moved)
        best = max(best, float(ratios.detach().max()))
        token = ratios.detach().argmax(-1)
        w = output.dual(moved.detach()[rows, token])
        (slope,) = torch.autograd.grad(ratios[rows, token].sum(), x)
        with torch.no_grad():
            length = radius * LARGEST_STEP * (SMALLEST_STEP / LARGEST_STEP) ** (step / max(1, steps - 1))
            # Every other step stays, so that the direction of one point is refined.
            if step % 2:
                slope = slope / _tokens(slope).amax(1, keepdim=True).clamp_min(1e-300)
                x = _into_ball(x + length * slope, radius - h)
            x = x.detach()
    return best


def lower_bounds(
    model: LlmNormForCausalLM,
    radius_rms: float,
    pairs: Sequence[str] = ("logit_difference", "logits_rms"),
    *,
    texts: Tensor | None = None,
    tokens: int = 16,
    restarts: int = 6,
    steps: int = 30,
    seed: int = 0,
) -> dict[str, float]:
    """For each norm pair of `certificate.NORM_PAIRS`, the largest ratio found, in its units.

    Starts from `restarts` random points, as many texts made of rows of the embedding at random, and `texts`
    [N, tokens] of token ids. The model is copied to fp64 and is left as it is.
    """
    double: Any = copy.deepcopy(model).double().eval()
    for parameter in double.parameters():
        parameter.requires_grad_(False)
    table = double.model.embed_tokens.weight
    width = table.shape[1]
    radius = radius_rms * math.sqrt(width)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(table.shape[0], (restarts, tokens), generator=generator).to(table.device)
    points = [random_points(restarts, tokens, width, radius, seed).to(table.device), table[ids]]
    if texts is not None:
        points.append(table[texts[:, :tokens].to(table.device)])
    starts = torch.cat(points)

    def logits(x: Tensor) -> Tensor:
        return double(inputs_embeds=x, use_cache=False).logits

    def hidden(x: Tensor) -> Tensor:
        return double.model(inputs_embeds=x, use_cache=False).last_hidden_state

    found = {}
    for pair in pairs:
        function, output = (hidden if pair == "hidden_rms" else logits), OUTPUT_NORMS[pair]
        ratio = max(
            random_ratio(function, starts, output),
            attacked_ratio(function, starts, radius, output, steps, seed),
        )
        found[pair] = ratio * math.sqrt(width)
    return found
