"""Optimizer steps in the fewest bytes: AdamW with 8-bit moments and stochastic rounding, SCALE and SinkGD
updates.

These change `param` and its state in place, never the gradient, and are not differentiable. The noise of
stochastic rounding is a hash of (seed, step, element), so that a resumed run repeats it on any device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .checks import (
    FLOATS,
    check_betas,
    check_floats,
    check_given,
    check_integers,
    check_numbers,
    check_same_shape,
)
from .dispatch import operator, register, runs_triton

STATE_BLOCK = 256
_WORD = 0xFFFFFFFF
# The hash takes 64-bit indices, many bytes for each element: so few at a time that they weigh nothing.
ROUNDED_AT_ONCE = 2**22


def _mix(x: int) -> int:
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _WORD
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _WORD
    return x ^ (x >> 16)


def rounding_key(seed: int, step: int) -> tuple[int, int]:
    """Two 32-bit words that no other (seed, step) below 2^32 shares in both."""
    check_integers(seed=seed, step=step)
    first = _mix(seed & _WORD)
    return _mix((first + step) & _WORD), _mix((first ^ _mix(step & _WORD)) + 0x9E3779B9 & _WORD)


def key_tensor(param: Tensor, seed: int | None, step: int) -> Tensor | None:
    if seed is None:
        return None
    return torch.tensor(rounding_key(seed, step), dtype=torch.int64).to(param.device, non_blocking=True)


def mix_words(word: Tensor) -> Tensor:
    """The hash of the kernels on int64 tensors that hold 32-bit words."""
    word = ((word ^ (word >> 16)) * 0x7FEB352D) & _WORD
    word = ((word ^ (word >> 15)) * 0x846CA68B) & _WORD
    return word ^ (word >> 16)


def round_stochastically(x: Tensor, key: Tensor, first: int = 0) -> Tensor:
    """float32 to bfloat16 with the noise of the kernels, bit for bit; `first` is the index of x's first
    element in the tensor that x is a contiguous part of."""
    index = torch.arange(first, first + x.numel(), device=x.device).view(x.shape)
    noise = mix_words(mix_words((index & _WORD) ^ key[0]) ^ (index >> 32) ^ key[1]) & 0xFFFF
    bits = x.contiguous().view(torch.int32).long() & _WORD
    finite = (bits & 0x7F800000) != 0x7F800000
    bits = torch.where(finite, bits + noise, bits) >> 16 << 16
    signed = torch.where(bits >= 1 << 31, bits - (1 << 32), bits).int()
    return signed.view(torch.float32).bfloat16()


@operator
@torch.no_grad()
def round_into_(param: Tensor, value: Tensor, *, seed: int, step: int, first: int = 0) -> None:
    """param = SR(value): each float32 number to one of its two bfloat16 neighbors, so that E[param] = value.

    param bfloat16, value float32, of one shape and contiguous. The noise is that of `adamw_`: a hash of
    (seed, step, first + index of the element), so that rows of a matrix that another process holds, from
    element `first` on, come out as they do in the whole. Raises ValueError for other dtypes, shapes, layouts.
    """
    check_same_shape("value", value, "param", param)
    if param.dtype != torch.bfloat16 or value.dtype != torch.float32:
        raise ValueError(
            f"param and value are {param.dtype} and {value.dtype}; they must be bfloat16, float32"
        )
    if not (param.is_contiguous() and value.is_contiguous()):
        raise ValueError("param and value must be contiguous")
    if param.is_meta:
        return
    key = key_tensor(param, seed, step)
    assert key is not None
    if first == 0 and param.numel() and runs_triton(param):
        flat = param.view(1, -1) if param.dim() < 2 else param.view(param.shape[0], -1)
        torch.ops.llmnorm_kernels.scaled_update_(flat, value.view(flat.shape), None, None, key, -1.0, 0.0)
        return
    source, target = value.view(-1), param.view(-1)
    for start in range(0, target.numel(), ROUNDED_AT_ONCE):
        part = slice(start, start + ROUNDED_AT_ONCE)
        target[part] = round_stochastically(source[part], key, first + start)


def quantized_moments(param: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Zero moments of `param` in 8 bits: (codes m int8, codes v uint8, scales m, scales v), one scale per 256
    elements."""
    blocks = -(-param.numel() // STATE_BLOCK)
    return (
        torch.zeros(param.shape, dtype=torch.int8, device=param.device),
        torch.zeros(param.shape, dtype=torch.uint8, device=param.device),
        torch.zeros(blocks, device=param.device),
        torch.zeros(blocks, device=param.device),
    )


def _blocks(x: Tensor) -> Tensor:
    return torch.nn.functional.pad(x.reshape(-1), (0, -x.numel() % STATE_BLOCK)).view(-1, STATE_BLOCK)


def decode_moments(m: Tensor, v: Tensor, m_scale: Tensor, v_scale: Tensor) -> tuple[Tensor, Tensor]:
    """m = sign(code) (code / 127)^2 m_scale and v = (code / 255)^4 v_scale, block by block, in float32."""
    m_part, v_part = _blocks(m.float() / 127.0), _blocks(v.float() / 255.0)
    full_m, full_v = m_part * m_part.abs() * m_scale[:, None], v_part**4 * v_scale[:, None]
    return full_m.view(-1)[: m.numel()].view(m.shape), full_v.view(-1)[: v.numel()].view(v.shape)


def encode_moments_(
    m: Tensor, v: Tensor, m_scale: Tensor, v_scale: Tensor, full_m: Tensor, full_v: Tensor
) -> None:
    """The inverse of `decode_moments` into the codes and scales, to the nearest code; a positive v keeps a
    positive code."""
    m_part, v_part = _blocks(full_m), _blocks(full_v)
    m_scale.copy_(m_part.abs().amax(1))
    v_scale.copy_(v_part.amax(1))
    m_code = (
        torch.floor((m_part.abs() / m_scale.clamp(min=1e-38)[:, None]).sqrt() * 127.0 + 0.5) * m_part.sign()
    )
    v_code = torch.floor((v_part / v_scale.clamp(min=1e-38)[:, None]).sqrt().sqrt() * 255.0 + 0.5)
    v_code = torch.where(v_part > 0, v_code.clamp(min=1.0), v_code)
    m.copy_(m_code.view(-1)[: m.numel()].view(m.shape).to(torch.int8))
    v.copy_(v_code.view(-1)[: v.numel()].view(v.shape).to(torch.uint8))


def adamw_reference(
    param: Tensor, grad: Tensor, m: Tensor, v: Tensor, m_scale: Tensor | None, v_scale: Tensor | None,
    key: Tensor | None, grad_scale: Tensor | None, lr: float, beta1: float, beta2: float, eps: float,
    decay: float, bc1: float, bc2_root: float,
) -> None:  # fmt: skip
    g = grad.float() if grad_scale is None else grad.float() * grad_scale
    full_m, full_v = (m.float(), v.float())
    if m_scale is not None and v_scale is not None:
        full_m, full_v = decode_moments(m, v, m_scale, v_scale)
    full_m = beta1 * full_m + (1.0 - beta1) * g
    full_v = beta2 * full_v + (1.0 - beta2) * g * g
    p = param.float() * decay - lr * (full_m / bc1) / (full_v.sqrt() / bc2_root + eps)
    if m_scale is not None and v_scale is not None:
        encode_moments_(m, v, m_scale, v_scale, full_m, full_v)
    else:
        m.copy_(full_m)
        v.copy_(full_v)
    param.copy_(p if key is None else round_stochastically(p, key))


register(
    "adamw_(Tensor(a!) param, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, "
    "Tensor(d!)? exp_avg_scale, Tensor(e!)? exp_avg_sq_scale, Tensor? key, Tensor? grad_scale, float lr, "
    "float beta1, float beta2, float eps, float decay, float bias_correction1, float bias_correction2_root) "
    "-> ()",
    "optimizer_kernels:launch_adamw",
    lambda *args: None,
)
register(
    "scaled_squares_(Tensor update, Tensor(a!) rows, Tensor? columns, float target, float eps, bool of_rows, "
    "bool of_columns) -> Tensor",
    "optimizer_kernels:launch_scaled_squares",
    lambda update, rows, columns, target, eps, of_rows, of_columns: update.new_empty(
        update.shape[1] if of_columns else 0, dtype=torch.float32
    ),
)
register(
    "scaled_update_(Tensor(a!) param, Tensor update, Tensor? rows, Tensor? columns, Tensor? key, float lr, "
    "float decay) -> ()",
    "optimizer_kernels:launch_scaled_update",
    lambda *args: None,
)


def check_step(
    param: Tensor,
    grad: Tensor,
    lr: float,
    weight_decay: float,
    eps: float,
    seed: int | None,
    name: str = "grad",
) -> None:
    check_given(**{"param": param, name: grad})
    check_floats(**{"param": param, name: grad})
    check_same_shape(name, grad, "param", param)
    for which, tensor in (("param", param), (name, grad)):
        if not tensor.is_contiguous():
            raise ValueError(
                f"{which} has strides {tensor.stride()}; an optimizer step takes contiguous tensors"
            )
        if tensor.dtype == torch.float64:
            raise ValueError(f"{which} has dtype torch.float64; a fused step takes float32 or 16-bit numbers")
    if seed is not None and param.dtype != torch.bfloat16:
        raise ValueError(
            f"seed is given but param has dtype {param.dtype}; stochastic rounding is for bfloat16"
        )
    check_numbers(lr=lr, weight_decay=weight_decay, eps=eps)


def check_moments(
    param: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, scales: tuple[Tensor, Tensor] | None
) -> None:
    """ValueError unless the moments, 8-bit codes where there are scales, belong to `param`."""
    check_given(exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    blocks = -(-param.numel() // STATE_BLOCK)
    kinds = (torch.int8, torch.uint8) if scales is not None else (None, None)
    for name, state, kind in (("exp_avg", exp_avg, kinds[0]), ("exp_avg_sq", exp_avg_sq, kinds[1])):
        if state.shape != param.shape or state.device != param.device or not state.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous and have the shape and device of param, {tuple(param.shape)}"
            )
        if state.dtype != kind if kind else state.dtype not in FLOATS:
            takes = kind or "float32, bfloat16, float16 or float64 without scales"
            raise ValueError(f"{name} has dtype {state.dtype}; it takes {takes}")
    for scale in scales or ():
        if scale.shape != (blocks,) or scale.dtype != torch.float32:
            raise ValueError(f"scales must be float32 of shape ({blocks},), one per {STATE_BLOCK} elements")


def check_grad_scale(grad_scale: Tensor | None, param: Tensor | None) -> None:
    """ValueError unless a clipping factor is one float32 number beside `param`."""
    if grad_scale is None or param is None:
        return
    check_given(grad_scale=grad_scale)
    if grad_scale.numel() != 1 or grad_scale.dtype != torch.float32 or grad_scale.device != param.device:
        raise ValueError(
            f"grad_scale is {grad_scale.dtype} {tuple(grad_scale.shape)} on {grad_scale.device}; it must be "
            f"one float32 number on {param.device}"
        )


@operator
@torch.no_grad()
def adamw_(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *, step: int, lr: float,
    betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0,
    scales: tuple[Tensor, Tensor] | None = None, seed: int | None = None, grad_scale: Tensor | None = None,
) -> None:  # fmt: skip
    """One step of AdamW (arXiv 1711.05101) in place, torch.optim.AdamW's equation in float32.

    m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2;  p = (1 - lr wd) p - lr (m / (1 - b1^t)) / (sqrt(v / (1 -
    b2^t)) + eps)

    param, grad: contiguous, float32 or 16-bit; step t counts from 1. exp_avg, exp_avg_sq: moments of any
    floating dtype, or with `scales` the codes of `quantized_moments` (8 bits, a float32 scale per 256
    elements). seed: round a bfloat16 param stochastically. grad_scale: a one-element float32 tensor, such as
    a clipping factor, read on the device. Bytes moved per element: 28 with float32 param and states and a
    bfloat16 gradient less its copy, 10 with bfloat16 and 8-bit states. Raises ValueError for shapes, dtypes,
    layouts and values out of range.
    """
    check_step(param, grad, lr, weight_decay, eps, seed)
    if step < 1:
        raise ValueError(f"step={step} must count from 1")
    check_betas(betas)
    check_moments(param, exp_avg, exp_avg_sq, scales)
    check_grad_scale(grad_scale, param)
    given = (
        param, grad, exp_avg, exp_avg_sq, *(scales or (None, None)), key_tensor(param, seed, step),
        grad_scale, float(lr), *betas, float(eps), 1.0 - lr * weight_decay, 1.0 - betas[0] ** step,
        math.sqrt(1.0 - betas[1] ** step),
    )  # fmt: skip
    if runs_triton(param):
        torch.ops.llmnorm_kernels.adamw_(*given)
    else:
        adamw_reference(*given)


def check_matrix(param: Tensor) -> None:
    if param.dim() != 2 or param.numel() == 0:
        raise ValueError(f"param has shape {tuple(param.shape)}; it must be a matrix that is not empty")


def _apply(
    param: Tensor,
    update: Tensor,
    rows: Tensor | None,
    columns: Tensor | None,
    key: Tensor | None,
    lr: float,
    decay: float,
) -> None:
    """p = decay p - lr diag(rows) update diag(columns)."""
    if runs_triton(param):
        torch.ops.llmnorm_kernels.scaled_update_(param, update, rows, columns, key, float(lr), decay)
        return
    scaled = update.float()
    if rows is not None:
        scaled = scaled * rows[:, None]
    if columns is not None:
        scaled = scaled * columns
    p = param.float() * decay - lr * scaled
    param.copy_(p if key is None else round_stochastically(p, key))


def _squares(
    update: Tensor,
    rows: Tensor,
    columns: Tensor | None,
    target: float,
    eps: float,
    of_rows: bool,
    of_columns: bool,
) -> Tensor:
    """rows *= target / max(|rows * update * columns| of each row, eps) if asked; then the column sums of
    (rows * update)^2."""
    if runs_triton(update):
        return torch.ops.llmnorm_kernels.scaled_squares_(
            update, rows, columns, target, eps, of_rows, of_columns
        )
    full = update.float()
    if of_rows:
        norms = (full if columns is None else full * columns).norm(dim=1)
        rows.copy_(rows * target / (rows * norms).clamp(min=eps))
    return (rows[:, None] * full).square().sum(0) if of_columns else full.new_empty(0)


@operator
@torch.no_grad()
def normalized_step_(
    param: Tensor, update: Tensor, *, dim: int, lr: float, weight_decay: float = 0.0, eps: float = 1e-8,
    seed: int | None = None, step: int = 0,
) -> None:  # fmt: skip
    """SCALE's step (arXiv 2506.16659): p = (1 - lr wd) p - lr d / max(sqrt(mean_dim(d^2)), eps), in float32,
    in place.

    param, update: (rows, columns); dim=1 divides each row by its RMS (Linear and head weights, (out, in)),
    dim=0 each column (embeddings). seed, step as in `adamw_`. Bytes moved: read d twice (once from L2 for
    rows that fit), p once, write p. Raises ValueError for shapes, dtypes, layouts and values out of range.
    """
    check_step(param, update, lr, weight_decay, eps, seed, "update")
    check_matrix(param)
    if dim not in (0, 1):
        raise ValueError(f"dim={dim} must be 0 (columns) or 1 (rows)")
    rows = torch.ones(param.shape[0], device=param.device)
    columns = None
    if dim == 1:
        width = math.sqrt(param.shape[1])
        _squares(update, rows, None, width, eps * width, True, False)
    else:
        mean = _squares(update, rows, None, 0.0, 0.0, False, True) / param.shape[0]
        columns = mean.sqrt_().clamp_(min=eps).reciprocal_()
    _apply(
        param, update, rows if dim == 1 else None, columns, key_tensor(param, seed, step), lr,
        1.0 - lr * weight_decay
    )  # fmt: skip


@operator
@torch.no_grad()
def scaled_step_(
    param: Tensor, update: Tensor, rows: Tensor | None = None, columns: Tensor | None = None, *, lr: float,
    weight_decay: float = 0.0, seed: int | None = None, step: int = 0,
) -> None:  # fmt: skip
    """p = (1 - lr wd) p - lr diag(rows) D diag(columns), in float32, in place.

    param, update D: (m, n); rows (m,) and columns (n,) float32, absent for ones. Other arguments as in
    `normalized_step_`. Bytes moved: read D and p, write p. Raises ValueError for shapes, dtypes, layouts and
    values out of range.
    """
    check_step(param, update, lr, weight_decay, 0.0, seed, "update")
    check_matrix(param)
    _check_factors(param, rows, columns)
    _apply(param, update, rows, columns, key_tensor(param, seed, step), lr, 1.0 - lr * weight_decay)


def _check_factors(param: Tensor, rows: Tensor | None, columns: Tensor | None) -> None:
    for name, factor, size in (("rows", rows, param.shape[0]), ("columns", columns, param.shape[1])):
        if factor is not None:
            check_given(**{name: factor})
        if factor is not None and (factor.shape != (size,) or factor.dtype != torch.float32):
            raise ValueError(f"{name} must be float32 of shape ({size},), a factor for each of {name}")
        if factor is not None and factor.device != param.device:
            raise ValueError(
                f"{name} is on {factor.device} but param is on {param.device}; move them together"
            )


@operator
@torch.no_grad()
def sinkgd_step_(
    param: Tensor, grad: Tensor, *, lr: float, iterations: int = 5, weight_decay: float = 0.0,
    eps: float = 1e-8, seed: int | None = None, step: int = 0, rows: Tensor | None = None,
    columns: Tensor | None = None,
) -> None:  # fmt: skip
    """SinkGD's step (arXiv 2502.06742): rows to L2 norm sqrt(n), columns to sqrt(m), `iterations` times, then
    p -= lr X.

    param, grad: (m, n). X = diag(r) G diag(c) is never stored: a pass reads G once, renews r, and sums the
    columns for c. Bytes moved: `iterations` + 1 reads of G, one of p, one write. rows, columns: r and c to
    begin with, float32, ones if absent; a 0 leaves its row or column out. Other arguments and errors as in
    `normalized_step_`.
    """
    check_step(param, grad, lr, weight_decay, eps, seed)
    check_matrix(param)
    if iterations < 1:
        raise ValueError(f"iterations={iterations} must be at least 1")
    _check_factors(param, rows, columns)
    m, n = param.shape
    rows = torch.ones(m, device=param.device) if rows is None else rows.clone()
    columns = torch.ones(n, device=param.device) if columns is None else columns
    for _ in range(iterations):
        squares = _squares(grad, rows, columns, math.sqrt(n), eps, True, True)
        columns = columns * math.sqrt(m) / (columns * squares.sqrt()).clamp_(min=eps)
    _apply(param, grad, rows, columns, key_tensor(param, seed, step), lr, 1.0 - lr * weight_decay)
