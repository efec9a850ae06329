"""What the compile gate builds: the launchers of `llmnorm_kernels`, called with the operand layouts that
training uses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

BF16, FP32 = torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Case:
    name: str
    launch: Callable[[], Any]
    # Unaligned operands load 16 bits at a time by nature; the gate then checks spills and shared memory only.
    aligned: bool = True
    # 16-bit loads that fetch one number a program.
    scalars: int = 0
    skip: tuple[str, ...] = ()


def empty(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype)


def unaligned(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    """A contiguous tensor whose address is one element past a multiple of 16 bytes."""
    size = 1
    for length in shape:
        size *= length
    return torch.empty(size + 1, dtype=dtype)[1:].view(shape)


def norm_cases() -> Iterator[Case]:
    from llmnorm_kernels.layout import empty_padded
    from llmnorm_kernels.norms_launch import BACKWARD, FORWARD, launch_backward, launch_forward

    rows = 64

    def forward(
        kind: str,
        width: int,
        make: Any = empty,
        residual: Any = None,
        after: bool = False,
        dtype: torch.dtype = BF16,
    ) -> Any:
        bias = empty(width, dtype=dtype) if kind == "layernorm" else None
        x = make(rows, width, dtype=dtype)
        other = None if residual is None else make(rows, width, dtype=residual)
        out = dtype
        return lambda: launch_forward(
            x, other, empty(width, dtype=dtype), bias, kind, after, 1e-6, 1.0, 1.0, False, True, out
        )

    def backward(
        kind: str, width: int, make: Any = empty, ds: bool = False, dtype: torch.dtype = BF16
    ) -> Any:
        acc = empty(rows, dtype=FP32)
        bias = empty(width, dtype=dtype) if kind == "layernorm" else None
        dy, x, extra = (make(rows, width, dtype=dtype) for _ in range(3))
        return lambda: launch_backward(
            dy, extra if ds else None, x, empty(width, dtype=dtype), bias, acc, acc, kind, 1.0, 1.0, False,
            True, dtype, None
        )  # fmt: skip

    for width in (*FORWARD, 65536):
        yield Case(f"rms {width}", forward("rmsnorm", width))
        yield Case(f"add+rms {width}", forward("rmsnorm", width, residual=BF16))
    for width in (*BACKWARD, 65536):
        yield Case(f"rms bwd {width}", backward("rmsnorm", width))
        yield Case(f"add+rms bwd {width}", backward("rmsnorm", width, ds=True))
    for width in (128, 1024, 4096, 8192, 65536):
        yield Case(f"layer {width}", forward("layernorm", width))
        yield Case(f"layer bwd {width}", backward("layernorm", width, ds=True))
    for width in (127, 1023, 4095, 8191, 65535):
        yield Case(f"crms odd {width}", forward("crmsnorm", width, make=unaligned), aligned=False)
        yield Case(f"crms odd bwd {width}", backward("crmsnorm", width, make=unaligned), aligned=False)
    for width in (1024, 8192):
        yield Case(f"layer shifted {width}", forward("layernorm", width, make=unaligned), aligned=False)
        yield Case(
            f"layer shifted bwd {width}", backward("layernorm", width, make=unaligned, ds=True), aligned=False
        )
    for width in (1023, 4095):
        # Weights of odd width stay 16-bit; the rows are what counts, and the table shows the difference to
        # "odd".
        yield Case(f"crms padded {width}", forward("crmsnorm", width, make=empty_padded), aligned=False)
        yield Case(f"crms padded bwd {width}", backward("crmsnorm", width, make=empty_padded), aligned=False)
    for width in (1024, 4096, 8192):
        yield Case(f"rms fp32 {width}", forward("rmsnorm", width, dtype=FP32))
        yield Case(f"rms bwd fp32 {width}", backward("rmsnorm", width, ds=True, dtype=FP32))
        yield Case(f"add+rms bf16+fp32 {width}", forward("rmsnorm", width, residual=FP32))
        yield Case(f"sandwich {width}", forward("rmsnorm", width, residual=BF16, after=True))


def pointwise_cases() -> Iterator[Case]:
    from llmnorm_kernels.rope_kernels import launch_norm_rope, launch_norm_rope_backward, launch_rope
    from llmnorm_kernels.swiglu_kernels import launch_gated_backward, launch_gated_forward

    packed, gate, wide = empty(64, 2 * 2816), empty(64, 2816), empty(64, 2816, dtype=FP32)
    for name in ("silu", "gelu_tanh"):
        yield Case(f"{name}", partial(launch_gated_forward, gate, gate, name))
        yield Case(f"{name} bwd", partial(launch_gated_backward, gate, gate, gate, name))
    yield Case("silu packed bwd", partial(launch_gated_backward, gate, packed, None, "silu"))
    yield Case("silu bwd fp32", partial(launch_gated_backward, wide, wide, wide, "silu"))
    for dim in (64, 96, 128, 256):
        q, k = empty(2, 128, 8, dim).transpose(1, 2), empty(2, 128, 2, dim).transpose(1, 2)
        table, gain = empty(1, 128, dim, dtype=FP32)[..., : dim // 2], empty(dim)
        norm = (gain, gain, table, table, 1e-6, False, True)
        yield Case(f"rope {dim}", partial(launch_rope, q, k, table, table, False))
        yield Case(f"qk_norm_rope {dim}", partial(launch_norm_rope, q, k, *norm))
        yield Case(f"qk_norm_rope bwd {dim}", partial(launch_norm_rope_backward, q, k, q, k, *norm))


def loss_cases() -> Iterator[Case]:
    from llmnorm_kernels.cross_entropy_kernels import (
        launch_cross_entropy,
        launch_cross_entropy_backward,
        loss_and_gradient_in_place,
    )

    target, token = torch.zeros(8, dtype=torch.long), empty(8, dtype=FP32)
    for vocabulary in (512, 32000, 128256):
        logits = empty(8, vocabulary)
        yield Case(
            f"ce {vocabulary}", partial(launch_cross_entropy, logits, target, -100, 0.0, 0.0), scalars=1
        )
        backward = (token, logits, target, token, -100, 30.0, 1e-4)
        yield Case(f"ce bwd {vocabulary}", partial(launch_cross_entropy_backward, *backward))
        in_place = (logits, target, token, -100, 30.0, 1e-4, True)
        yield Case(f"linear ce {vocabulary}", partial(loss_and_gradient_in_place, *in_place), scalars=1)
    odd = empty(8, 50257)
    yield Case(
        "linear ce odd 50257",
        partial(loss_and_gradient_in_place, odd, target, None, -100, 0.0, 0.0, True),
        False,
    )
    wide = empty(8, 32000, dtype=FP32)
    yield Case(
        "linear ce fp32", partial(loss_and_gradient_in_place, wide, target, None, -100, 0.0, 0.0, True)
    )


def quantize_cases() -> Iterator[Case]:
    from llmnorm_kernels.quantize_kernels import FORMAT_CODES, launch_quantize

    x = empty(64, 2816)
    for name in FORMAT_CODES:
        group = {"nvfp4": 16, "mxfp4": 32}.get(name, 128)
        yield Case(f"quantize {name}", partial(launch_quantize, x, name, group, 0))
    yield Case("quantize uniform9 outliers", partial(launch_quantize, x, "uniform9", 256, 2))
    key = torch.zeros(2, dtype=torch.long)
    yield Case("quantize fp4 stochastic", partial(launch_quantize, x, "fp4", 128, 0, key))


def optimizer_cases() -> Iterator[Case]:
    from llmnorm_kernels.adamw_many_kernels import launch_adamw_many
    from llmnorm_kernels.blockwise_kernels import launch_adamw_blockwise
    from llmnorm_kernels.low_rank_kernels import launch_low_rank_moments
    from llmnorm_kernels.newton_schulz_kernels import launch_symmetric
    from llmnorm_kernels.optimizer_kernels import (
        launch_adamw,
        launch_scaled_squares,
        launch_scaled_update,
    )

    param, m, v = empty(1 << 16), empty(1 << 16, dtype=FP32), empty(1 << 16, dtype=FP32)
    codes = empty(1 << 16, dtype=torch.int8), empty(1 << 16, dtype=torch.uint8)
    scales = empty(256, dtype=FP32), empty(256, dtype=FP32)
    key, clip = torch.zeros(2, dtype=torch.long), empty(1, dtype=FP32)
    numbers = (0.1, 0.9, 0.999, 1e-8, 0.99, 0.1, 0.1)
    master = (m, param, m, v, None, None, None, clip, *numbers)
    yield Case("adamw fp32", partial(launch_adamw, *master))
    eight_bit = (param, param, *codes, *scales, key, clip, *numbers)
    yield Case("adamw 8-bit stochastic", partial(launch_adamw, *eight_bit))
    matrix, rows, columns = empty(64, 2048), empty(64, dtype=FP32), empty(2048, dtype=FP32)
    yield Case("scale rows", partial(launch_scaled_squares, matrix, rows, None, 1.0, 1e-8, True, False))
    yield Case("sinkgd pass", partial(launch_scaled_squares, matrix, rows, columns, 1.0, 1e-8, True, True))
    yield Case("sinkgd update", partial(launch_scaled_update, matrix, matrix, rows, columns, key, 0.1, 1.0))
    projected = {"rows": empty(64, 256, dtype=FP32), "columns": empty(256, 4096, dtype=FP32)}
    for name, low in projected.items():
        given = (low, low, low, 0.9, 0.999, 1e-6, 1.0, 1.0, name == "rows", True)
        yield Case(f"low rank {name}", partial(launch_low_rank_moments, *given))
    for name, tensor in (("fp32", m), ("bf16", param)):
        four = ([tensor], [param], [m], [v])
        # The tail of a tensor is masked by its length, so that its loads are narrow, one number a thread.
        yield Case(f"adamw many {name}", partial(launch_adamw_many, *four, clip, *numbers), scalars=16)
    blocks = {
        "8": (256, 256, empty(64, 2816, dtype=torch.uint8)),
        "4": (128, 16, empty(64, 1408, dtype=torch.uint8)),
    }
    cells, wide = empty(1 << 16, dtype=torch.int32), empty(64, 2816, dtype=FP32)
    for bits, (block, length, packed) in blocks.items():
        held, tables = (packed, empty(64, 2816 // block, dtype=FP32)), (empty(length, dtype=FP32), cells)
        given = (empty(64, 2816), *held, *held, *tables, *tables)
        master = (wide, *given, None, block, *numbers)
        yield Case(f"adamw {bits}-bit blocks fp32", partial(launch_adamw_blockwise, *master))
        rounded = (empty(64, 2816), *given, key, block, *numbers)
        yield Case(f"adamw {bits}-bit blocks stochastic", partial(launch_adamw_blockwise, *rounded))
    for n in (512, 2048):
        for dtype in (BF16, FP32):
            x, addend = empty(1, n, 4096, dtype=dtype), empty(1, n, n, dtype=dtype)
            yield Case(f"symmetric {n} {str(dtype)[6:]}", partial(launch_symmetric, x, addend, 1.0, 1.0))


def attention_cases() -> Iterator[Case]:
    from llmnorm_kernels.linear_attention_launch import launch_attention, launch_attention_backward

    def pair(name: str, features: int, width: int, map_code: int, packed: bool, floor: float) -> Any:
        q, v = (empty(2, 256, 4, size).transpose(1, 2) for size in (features, width))
        row = empty(2, 4, 256, dtype=FP32)
        scalars = (row, row) if map_code == 2 else (None, None)
        given = (*scalars, torch.zeros(2, 256, dtype=torch.int32) if packed else None)
        numbers = (1e-6, floor, map_code)
        columns = features * (2 if map_code == 2 else 1) + (floor != 0.0)
        state = empty(2, 4, columns, width, dtype=FP32), empty(2, 4, columns, dtype=FP32)
        # 256 features leave tiles of 16 x 16 values to a chunk, one number a thread; in the backward pass
        # only those of a map of two halves.
        wide = int(features * (2 if map_code == 2 else 1) > 128)
        forward = partial(launch_attention, q, q, v, *given)
        yield Case(f"attention {name}", partial(forward, None, None, *numbers, False), scalars=wide)
        yield Case(f"attention state {name}", partial(forward, *state, *numbers, True), scalars=wide)
        backward = (v, v, row, q, q, v, *given, None, None, *numbers)
        narrow = wide if map_code == 2 else 0
        yield Case(f"attention bwd {name}", partial(launch_attention_backward, *backward), scalars=narrow)

    for features, width in ((64, 64), (128, 128), (256, 128)):
        yield from pair(f"{features}x{width}", features, width, 0, False, 0.0)
    yield from pair("64x64 packed", 64, 64, 0, True, 0.0)
    for size in (64, 128):
        yield from pair(f"relu {size} packed", size, size, 1, True, 0.1)
        yield from pair(f"relu_split {size}", size, size, 2, False, 0.1)
        yield from pair(f"relu_split {size} packed", size, size, 2, True, 0.1)


def cases() -> Iterator[Case]:
    yield from norm_cases()
    yield from pointwise_cases()
    yield from loss_cases()
    yield from quantize_cases()
    yield from optimizer_cases()
    yield from attention_cases()
