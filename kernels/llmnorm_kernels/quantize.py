"""4-bit fake quantization of weights and activations by groups, with a straight-through gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .checks import check_choice, check_floats, check_given, check_integers
from .dispatch import operator, register, runs_triton
from .optimizer_steps import mix_words, rounding_key

FORMATS = ("int4", "int4_asymmetric", "fp4", "nvfp4", "mxfp4", "uniform9")
# The microscaling formats fix their group; the others take any.
FIXED_GROUPS = {"nvfp4": 16, "mxfp4": 32}
LARGEST_GROUP = 1024
MOST_OUTLIERS = 8


def _e2m1(a: Tensor, noise: Tensor | None) -> Tensor:
    step = torch.where(a < 2.0, 0.5, torch.where(a < 4.0, 1.0, 2.0))
    return (_rounded(a / step, noise) * step).clamp(max=6.0)


def _rounded(x: Tensor, noise: Tensor | None) -> Tensor:
    return torch.round(x) if noise is None else torch.floor(x + noise)


def uniform_noise(x: Tensor, key: Tensor) -> Tensor:
    """u in [0, 1) for each number of x, in steps of 2^-24: a hash of the key and the number's place in x."""
    index = torch.arange(x.numel(), device=x.device).view(x.shape)
    word = mix_words(mix_words((index & 0xFFFFFFFF) ^ key[0]) ^ (index >> 32) ^ key[1])
    return (word >> 8).float() * 2.0**-24


def _e4m3(a: Tensor) -> Tensor:
    a = a.clamp(max=448.0)
    step = torch.ldexp(torch.ones_like(a), (torch.frexp(a).exponent - 1).clamp(min=-6) - 3)
    return (torch.round(a / step) * step).clamp(max=448.0)


def quantize_reference(
    x: Tensor, format: str, group_size: int, outliers: int, key: Tensor | None = None
) -> Tensor:
    """The numbers of x on the grid of their group, in torch operations: the specification."""
    width = x.shape[-1]
    short = -width % group_size

    def grouped(values: Tensor) -> Tensor:
        return torch.nn.functional.pad(values, (0, short)).unflatten(-1, (-1, group_size))

    groups = grouped(x.float())
    noise = None if key is None else grouped(uniform_noise(x, key))
    inside = torch.ones(width, dtype=torch.bool, device=x.device)
    inside = torch.nn.functional.pad(inside, (0, short)).unflatten(-1, (-1, group_size))
    body, kept = groups, torch.zeros_like(groups)
    for _ in range(outliers):
        here = torch.zeros_like(body, dtype=torch.bool)
        here.scatter_(-1, body.abs().argmax(-1, keepdim=True), True)
        kept = torch.where(here, kept + body, kept)
        body = body.masked_fill(here, 0.0)
    a, sign = body.abs(), torch.where(body < 0, -1.0, 1.0)
    top = a.amax(-1, keepdim=True)
    if format == "int4":
        scale = top / 7.0
        y = _rounded(a / torch.where(scale > 0, scale, 1.0), noise).clamp(max=7.0) * scale * sign
    elif format == "int4_asymmetric":
        low = torch.where(inside, body, torch.inf).amin(-1, keepdim=True)
        high = torch.where(inside, body, -torch.inf).amax(-1, keepdim=True)
        scale = (high - low).clamp(min=1e-5) / 15.0
        zero = (-torch.round(low / scale)).clamp(0.0, 15.0)
        y = ((_rounded(body / scale, noise) + zero).clamp(0.0, 15.0) - zero) * scale
    elif format == "uniform9":
        top = top.clamp(min=1e-6)
        y = _rounded(4.0 * a / top, noise).clamp(max=4.0) * (top * 0.25) * sign
    else:
        if format == "fp4":
            scale = top / 6.0
        elif format == "nvfp4":
            largest = x.abs().amax().float()
            stretch = 2688.0 / torch.where(largest > 0, largest, 1.0)
            scale = _e4m3(top / 6.0 * stretch) / stretch
        else:
            scale = torch.ldexp(torch.ones_like(top), (torch.frexp(top).exponent - 3).clamp(min=-126))
        y = _e2m1(a / torch.where(scale > 0, scale, 1.0), noise) * scale * sign
    y = torch.where(kept != 0, kept, y)
    return y.flatten(-2)[..., :width].to(x.dtype)


register(
    "fake_quantize(Tensor x, str format, int group_size, int outliers, Tensor? key=None) -> Tensor",
    "quantize_kernels:launch_quantize",
    lambda x, format, group_size, outliers, key=None: x.new_empty(x.shape),
)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, format: str, group_size: int, outliers: int, key: Tensor | None, triton: bool
    ) -> Tensor:
        if triton:
            return torch.ops.llmnorm_kernels.fake_quantize(x, format, group_size, outliers, key)
        return quantize_reference(x, format, group_size, outliers, key)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return dy, None, None, None, None, None


@operator
def fake_quantize(
    x: Tensor,
    format: str = "int4",
    group_size: int | None = None,
    *,
    outliers: int = 0,
    seed: int | None = None,
    step: int = 0,
) -> Tensor:
    """y = dequantize(quantize(x)), group by group along the last dimension; the gradient passes through
    unchanged.

    int4             15 levels, s = max|x| / 7;  y = s clamp(round(x / s), -7, 7)
    int4_asymmetric  16 levels, s = (max - min) / 15, zero = clamp(-round(min / s), 0, 15)
    fp4              e2m1 grid {0, .5, 1, 1.5, 2, 3, 4, 6} and its negatives, s = max|x| / 6 in float32
    nvfp4            e2m1, groups of 16, s rounded to e4m3 after a tensor scale of 2688 / max|tensor|
    mxfp4            e2m1, groups of 32, s = 2^(floor(log2 max|x|) - 2)
    uniform9         9 levels, y = a / 4 round(4 x / a), a = max|x|: Stable-SPAM's released "FP4" (arXiv
    2502.17055)

    x: (..., width), float32 or 16-bit; the last group of a row may be shorter; group_size: 128 unless the
    format fixes it. outliers: that many largest magnitudes of each group stay exact and do not set its scale.
    Everything is float32, rounding is to nearest even, a group of zeros stays zero. seed: round(y) becomes
    floor(y + u) on magnitudes, u a hash of (seed, step, place of the number in x): right on average, but for
    what the ends of an asymmetric range cut off, and the same on every device. Bytes moved: 2 M N B.
    Raises ValueError for other dtypes, formats, sizes.
    """
    check_given(x=x)
    check_floats(x=x)
    check_choice("format", format, FORMATS)
    if x.dtype == torch.float64:
        raise ValueError("x has dtype torch.float64; fake_quantize takes float32, bfloat16 or float16")
    if x.dim() == 0:
        raise ValueError("x has no dimension to group; it must be (..., width)")
    fixed = FIXED_GROUPS.get(format)
    if group_size is None:
        group_size = fixed or 128
    if fixed is not None and group_size != fixed:
        raise ValueError(f"group_size={group_size} contradicts {format}, whose groups have {fixed} numbers")
    if not isinstance(group_size, int) or not 2 <= group_size <= LARGEST_GROUP:
        raise ValueError(f"group_size={group_size!r} must be between 2 and {LARGEST_GROUP}")
    check_integers(outliers=outliers)
    if not 0 <= outliers <= min(MOST_OUTLIERS, group_size - 1):
        raise ValueError(f"outliers={outliers} must be between 0 and {min(MOST_OUTLIERS, group_size - 1)}")
    key = None
    if seed is not None:
        key = torch.tensor(rounding_key(seed, step), dtype=torch.int64).to(x.device, non_blocking=True)
    return _StraightThrough.apply(x, format, group_size, outliers, key, runs_triton(x))
