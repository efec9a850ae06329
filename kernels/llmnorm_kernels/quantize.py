"""4-bit fake quantization of weights and activations by groups, with a straight-through gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .dispatch import check_choice, check_floats, operator, register, runs_triton

FORMATS = ("int4", "int4_asymmetric", "fp4", "nvfp4", "mxfp4", "uniform9")
# The microscaling formats fix their group; the others take any.
FIXED_GROUPS = {"nvfp4": 16, "mxfp4": 32}
LARGEST_GROUP = 1024
MOST_OUTLIERS = 8


def _e2m1(a: Tensor) -> Tensor:
    step = torch.where(a < 2.0, 0.5, torch.where(a < 4.0, 1.0, 2.0))
    return (torch.round(a / step) * step).clamp(max=6.0)


def _e4m3(a: Tensor) -> Tensor:
    a = a.clamp(max=448.0)
    step = torch.ldexp(torch.ones_like(a), (torch.frexp(a).exponent - 1).clamp(min=-6) - 3)
    return (torch.round(a / step) * step).clamp(max=448.0)


def quantize_reference(x: Tensor, format: str, group_size: int, outliers: int) -> Tensor:
    """The numbers of x on the grid of their group, in torch operations: the specification."""
    width = x.shape[-1]
    short = -width % group_size
    groups = torch.nn.functional.pad(x.float(), (0, short)).unflatten(-1, (-1, group_size))
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
        y = torch.round(a / torch.where(scale > 0, scale, 1.0)).clamp(max=7.0) * scale * sign
    elif format == "int4_asymmetric":
        low = torch.where(inside, body, torch.inf).amin(-1, keepdim=True)
        high = torch.where(inside, body, -torch.inf).amax(-1, keepdim=True)
        scale = (high - low).clamp(min=1e-5) / 15.0
        zero = (-torch.round(low / scale)).clamp(0.0, 15.0)
        y = ((torch.round(body / scale) + zero).clamp(0.0, 15.0) - zero) * scale
    elif format == "uniform9":
        top = top.clamp(min=1e-6)
        y = torch.round(4.0 * a / top) * (top * 0.25) * sign
    else:
        if format == "fp4":
            scale = top / 6.0
        elif format == "nvfp4":
            largest = x.abs().amax().float()
            stretch = 2688.0 / torch.where(largest > 0, largest, 1.0)
            scale = _e4m3(top / 6.0 * stretch) / stretch
        else:
            scale = torch.ldexp(torch.ones_like(top), (torch.frexp(top).exponent - 3).clamp(min=-126))
        y = _e2m1(a / torch.where(scale > 0, scale, 1.0)) * scale * sign
    y = torch.where(kept != 0, kept, y)
    return y.flatten(-2)[..., :width].to(x.dtype)


register(
    "fake_quantize(Tensor x, str format, int group_size, int outliers) -> Tensor",
    "quantize_kernels:launch_quantize",
    lambda x, format, group_size, outliers: x.new_empty(x.shape),
)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, format: str, group_size: int, outliers: int, triton: bool) -> Tensor:
        if triton:
            return torch.ops.llmnorm_kernels.fake_quantize(x, format, group_size, outliers)
        return quantize_reference(x, format, group_size, outliers)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return dy, None, None, None, None


@operator
def fake_quantize(
    x: Tensor, format: str = "int4", group_size: int | None = None, *, outliers: int = 0
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
    Everything is float32, rounding is to nearest even, a group of zeros stays zero. Bytes moved: 2 M N B.
    Raises ValueError for other dtypes, formats, sizes.
    """
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
    if not 2 <= group_size <= LARGEST_GROUP:
        raise ValueError(f"group_size={group_size} must be between 2 and {LARGEST_GROUP}")
    if not 0 <= outliers <= min(MOST_OUTLIERS, group_size - 1):
        raise ValueError(f"outliers={outliers} must be between 0 and {min(MOST_OUTLIERS, group_size - 1)}")
    return _StraightThrough.apply(x, format, group_size, outliers, runs_triton(x))
