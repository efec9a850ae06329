"""How far a part of a transformer can move its output: arithmetic on the norms of its weights.

Every bound is on a ball. If ||x_t||_2 <= R for all tokens t, and x moves inside the ball by at most delta at
each token (the norm max_t ||.||_2), then a part with `Bound(lipschitz, radius)` moves its output by at most
lipschitz * delta at each token, and ||output_t||_2 <= radius. The ball is convex, so a bound of the Jacobian
on it is a bound for pairs of points.

Softmax attention of query head h with logit scale beta, s_1 norms |.|, blocks Q_h, K_h, V_h [d, D] of rows
and O_h [D, d] of columns, q, k and v the maps to queries, keys and values:

    L_h   = L_v + beta (L_q B_k + B_q L_k) S_v          = |V_h| (1 + 2 beta |Q_h| |K_h| R^2)  without norms
    L     = min(|O| sqrt(sum_h L_h^2), sum_h |O_h| L_h)
    B     = min(|O| sqrt(sum_h B_h^2), sum_h |O_h| B_h)

L_q, B_q and so on are Lipschitz constants and radii, S_v the radius of the values less what they have in
common. Proof: do_i = sum_j A_ij dv_j + sum_j dA_ij v_j. Rows of A are convex weights, so the first sum is at
most L_v delta. dA_ij = A_ij (dS_ij - E_A dS_i), so the second is the covariance of dS and v under A, at most
std(dS) sup_u std(u . v) <= max|dS| S_v. Rotary positions are orthogonal and change nothing. Heads join by
Cauchy-Schwarz or by the triangle inequality; with grouped keys (GQA) the sums are over query heads.

The published recursion (Training Transformers with Enforced Lipschitz Constants, arXiv 2507.13338) has
c |O| |V| (1 + 2 s |Q| |K| a^2) with root-mean-square norms of the whole matrices. That is right for one head
only: a slice of D/H features can carry all the energy of a vector, so the logits of a head can be H times
larger, and heads that look at different tokens make the joined values sqrt(H) times larger.
`published_attention` is here for comparison.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from llmnorm.errors import UserError


class NoCertificate(UserError):
    """A part of the model has no useful bound: names the part, the reason and the remedy."""


class Bound(NamedTuple):
    """On the ball at hand: the Lipschitz constant in max_t ||.||_2, and the largest ||output_t||_2."""

    lipschitz: float
    radius: float


@dataclass(frozen=True)
class Matrix:
    """Upper bounds of a linear map y = W x + b, W [m, n].

    sigma: s_1(W). row: the largest norm of a row. bias: ||b||_2; largest_bias: max|b_i|.
    """

    sigma: float
    row: float
    bias: float = 0.0
    largest_bias: float = 0.0

    def reach(self, radius: float) -> float:
        """Of ||y||_2 for ||x||_2 <= radius."""
        return self.sigma * radius + self.bias

    def entry(self, radius: float) -> float:
        """Of max|y_i| for ||x||_2 <= radius."""
        return self.row * radius + self.largest_bias


@dataclass(frozen=True)
class Activation:
    """A pointwise function: its largest slope, rounded up, and max |act| on [-t, t] as a function of t.

    contracts: |act(t)| <= |t| for all t, so that ||act(y)||_2 <= ||y||_2.
    """

    slope: float
    largest: Callable[[float], float]
    contracts: bool = True


def _sigmoid(t: float) -> float:
    return 1 / (1 + math.exp(-t)) if t > -700 else 0.0


def _silu(t: float) -> float:
    return t * _sigmoid(t)


def _relu(t: float) -> float:
    return max(t, 0.0)


def _own_argument(t: float) -> float:
    return t


# `hidden_act` -> what bounds it. Slopes: SiLU 1.0998393 at 2.3994, GeLU 1.1289041 at sqrt(2), its tanh form
# 1.1289927; quick_gelu(t) = SiLU(1.702 t) / 1.702 has SiLU's.
ACTIVATIONS: dict[str, Activation] = {
    "silu": Activation(1.09984, _silu),
    "swish": Activation(1.09984, _silu),
    "quick_gelu": Activation(1.09984, _own_argument),
    "gelu": Activation(1.12891, _own_argument),
    "gelu_pytorch_tanh": Activation(1.12900, _own_argument),
    "gelu_new": Activation(1.12900, _own_argument),
    "relu": Activation(1.0, _relu),
    "tanh": Activation(1.0, math.tanh),
    "linear": Activation(1.0, _own_argument),
    "sigmoid": Activation(0.25, _sigmoid, contracts=False),
}


def floor_norm(radius: float, width: int, floor: float, gain: float, shift: float = 0.0) -> Bound:
    """gain * x / max(rms(x), floor) + shift: the projection onto the ball of rms `floor`, times gain / floor.

    gain: max|gain_i|. shift: ||shift||_2. A projection onto a convex set is 1-Lipschitz.
    """
    slope = gain / floor
    return Bound(slope, min(gain * math.sqrt(width), slope * radius) + shift)


def head_slope(value_slope: float, spread: float, query: Bound, key: Bound, scale: float) -> float:
    """L_h = L_v + beta (L_q B_k + B_q L_k) S_v of one head."""
    return value_slope + scale * (query.lipschitz * key.radius + query.radius * key.lipschitz) * spread


def joined(heads: Sequence[float], whole: float, blocks: Sequence[float]) -> float:
    """min(|O| sqrt(sum_h L_h^2), sum_h |O_h| L_h): heads side by side, then O."""
    stacked = whole * math.sqrt(sum(head * head for head in heads))
    return min(stacked, sum(block * head for block, head in zip(blocks, heads, strict=True)))


def plain_mlp(radius: float, first: Matrix, second: Matrix, activation: Activation, factor: float) -> Bound:
    """factor * W_2 act(W_1 x + b_1) + b_2, Lipschitz on the whole space; hidden width unknown, so act must
    contract.
    """
    assert activation.contracts
    inner = first.reach(radius)
    return Bound(
        factor * second.sigma * activation.slope * first.sigma, factor * second.sigma * inner + second.bias
    )


def gated_mlp(
    radius: float,
    gate: Matrix,
    up: Matrix,
    down: Matrix,
    activation: Activation,
    width: int,
    clip: float = math.inf,
) -> Bound:
    """W_down (act(g) * u), g = clip(W_gate x + b_gate), u = clip(W_up x + b_up), `width` hidden features:
    quadratic in x and so Lipschitz on a ball only, unless clip is finite.

        L = |W_down| (slope max|u_i| |W_gate| + max|act(g_i)| |W_up|)
    """
    largest_up = min(up.entry(radius), clip)
    largest_gate = activation.largest(min(gate.entry(radius), clip))
    slope = activation.slope * largest_up * gate.sigma + largest_gate * up.sigma
    everywhere = math.sqrt(width)
    ups = min(up.reach(radius), clip * everywhere)
    gates = largest_gate * everywhere
    if activation.contracts:
        gates = min(gates, gate.reach(radius))
    hidden = min(largest_gate * ups, largest_up * gates)
    return Bound(down.sigma * slope, down.sigma * hidden + down.bias)


def added(shortcut: Bound, a: float, branch: Bound, b: float) -> Bound:
    """a * xs + b * y, two functions of the same x."""
    return Bound(
        abs(a) * shortcut.lipschitz + abs(b) * branch.lipschitz,
        abs(a) * shortcut.radius + abs(b) * branch.radius,
    )


def composed(first: Bound, second: Bound) -> Bound:
    """second after first, where `second` was taken on the ball of radius first.radius."""
    return Bound(first.lipschitz * second.lipschitz, second.radius)


def published_attention(
    query: float, key: float, value: float, output: float, scale: float, rms: float, factor: float = 1.0
) -> Bound:
    """c |O| |V| (1 + 2 s |Q| |K| a^2): NOT a bound for more than one head; see this module.

    query to output: root-mean-square norms of the whole matrices. scale: s = beta head_dim. rms: a = R /
    sqrt(D). The radius is in root mean square too.
    """
    reach = factor * output * value
    return Bound(reach * (1 + 2 * scale * query * key * rms * rms), reach * rms)
