"""Feature maps of linear attention and their derivatives inside a chunk, for the kernels of
`linear_attention_kernels`.

A map gives one half of features or two, of the width of its input: relu_split's are split by sign. Both are
formed in float32 from what was loaded and rounded to its dtype for the products, so that numerator and
denominator see the same numbers.
"""

from __future__ import annotations

import triton
import triton.language as tl

MAPPED = tl.constexpr(0)  # what comes are features already
RELU = tl.constexpr(1)
RELU_SPLIT = tl.constexpr(2)
MAP_CODES = {None: 0, "relu": 1, "relu_split": 2}

RATIO_FLOOR = tl.constexpr(1e-30)


@triton.jit
def load_query_rows(POWER, TOP, first, step, limit, MAP: tl.constexpr):
    """The exponent and the largest magnitude of each query of a chunk; ones for maps that read neither."""
    power = tl.full(step.shape, 1.0, tl.float32)
    top = power
    if MAP == RELU_SPLIT:
        power = tl.load(POWER + first + step, mask=step < limit, other=1.0)
        top = tl.load(TOP + first + step, mask=step < limit, other=1.0)
    return power, top


@triton.jit
def log2_ratio(q, top):
    return tl.log2(tl.maximum(tl.abs(q.to(tl.float32)) / top[:, None], RATIO_FLOOR))


@triton.jit
def query_features(q, power, top, MAP: tl.constexpr, HALF: tl.constexpr):
    """A half of phi_q: q; relu(q); or (|q| / top)^power where q > 0 (half 0), where q < 0 (half 1)."""
    features = q
    if MAP == RELU:
        features = tl.maximum(q.to(tl.float32), 0.0).to(q.dtype)
    if MAP == RELU_SPLIT:
        x = q.to(tl.float32)
        if HALF == 1:
            x = -x
        f = tl.exp2(power[:, None] * log2_ratio(q, top))
        features = tl.where(x > 0.0, f, 0.0).to(q.dtype)
    return features


@triton.jit
def key_features(k, MAP: tl.constexpr, HALF: tl.constexpr):
    """A half of phi_k: k; relu(k); or relu(k)^3 (half 0), relu(-k)^3 (half 1)."""
    features = k
    if MAP == RELU:
        features = tl.maximum(k.to(tl.float32), 0.0).to(k.dtype)
    if MAP == RELU_SPLIT:
        x = k.to(tl.float32)
        if HALF == 1:
            x = -x
        features = tl.maximum(x * x * x, 0.0).to(k.dtype)
    return features


@triton.jit
def query_slopes(q, power, top, first, second, MAP: tl.constexpr):
    """(dq with top held fixed, d power, d top) from the gradients of both halves.

    With r = |q| / top and f = r^p: dq = sign(q) df p r^(p-1) / top, dp = sum df f ln r, dtop = -sum df p f /
    top. The gradient is 0 at q = 0.
    """
    dq = first
    dpower = tl.zeros([q.shape[0]], tl.float32)
    dtop = dpower
    if MAP == RELU:
        dq = tl.where(q.to(tl.float32) > 0.0, first, 0.0)
    if MAP == RELU_SPLIT:
        x = q.to(tl.float32)
        log_r = log2_ratio(q, top)
        df = tl.where(x > 0.0, first, tl.where(x < 0.0, second, 0.0))
        slope = df * power[:, None] * tl.exp2((power[:, None] - 1.0) * log_r)
        pull = slope * tl.exp2(log_r)
        dpower = tl.sum(pull * log_r, 1) * 0.6931471805599453 / power
        dtop = -tl.sum(pull, 1) / top
        dq = tl.where(x < 0.0, -slope, slope) / top[:, None]
    return dq, dpower, dtop


@triton.jit
def key_slopes(k, first, second, MAP: tl.constexpr):
    """dk from the gradients of both halves: for a cube 3 k^2 (d+ 1(k > 0) - d- 1(k < 0))."""
    dk = first
    if MAP == RELU:
        dk = tl.where(k.to(tl.float32) > 0.0, first, 0.0)
    if MAP == RELU_SPLIT:
        x = k.to(tl.float32)
        dk = 3.0 * x * x * tl.where(x > 0.0, first, -second)
    return dk
