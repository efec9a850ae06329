"""Triton kernel of AdamW on many tensors in one launch, through a table of addresses, and its launcher."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dispatch import on_device
from .optimizer_kernels import adam_direction, adam_moments

MANY_CHUNK = 2048
TRITON_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def adamw_part(
    P, G, M, V, GRAD_SCALE, at, inside, lr, b1, c1, b2, c2, eps, decay, bc1, bc2_root,
    HAS_SCALE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """A chunk of one tensor; WHOLE chunks carry no mask, so that their loads stay 128 bits wide."""
    if WHOLE:
        p, g, m, v = tl.load(P + at), tl.load(G + at), tl.load(M + at), tl.load(V + at)
    else:
        p = tl.load(P + at, mask=inside, other=0.0)
        g = tl.load(G + at, mask=inside, other=0.0)
        m = tl.load(M + at, mask=inside, other=0.0)
        v = tl.load(V + at, mask=inside, other=0.0)
    g = g.to(tl.float32)
    if HAS_SCALE:
        g *= tl.load(GRAD_SCALE)
    m, v = adam_moments(g, m.to(tl.float32), v.to(tl.float32), b1, c1, b2, c2)
    p = p.to(tl.float32) * tl.cast(decay, tl.float32)
    p -= tl.cast(lr, tl.float32) * adam_direction(m, v, eps, bc1, bc2_root)
    if WHOLE:
        tl.store(M + at, m.to(M.dtype.element_ty))
        tl.store(V + at, v.to(V.dtype.element_ty))
        tl.store(P + at, p.to(P.dtype.element_ty))
    else:
        tl.store(M + at, m.to(M.dtype.element_ty), mask=inside)
        tl.store(V + at, v.to(V.dtype.element_ty), mask=inside)
        tl.store(P + at, p.to(P.dtype.element_ty), mask=inside)


@triton.jit
def adamw_many(
    TABLE, OWNER, GRAD_SCALE, lr, b1, c1, b2, c2, eps, decay, bc1, bc2_root,
    P_TYPE: tl.constexpr, G_TYPE: tl.constexpr, S_TYPE: tl.constexpr, ALIGNED: tl.constexpr,
    HAS_SCALE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One chunk of one tensor a program: OWNER (programs, 2) says which, TABLE (tensors, 5) has the addresses
    of param, grad and moments, and the length."""
    program = tl.program_id(0)
    row = TABLE + tl.load(OWNER + 2 * program) * 5
    start = tl.load(OWNER + 2 * program + 1) * BLOCK
    size = tl.load(row + 4)
    p = tl.load(row).to(tl.pointer_type(P_TYPE))
    g = tl.load(row + 1).to(tl.pointer_type(G_TYPE))
    m = tl.load(row + 2).to(tl.pointer_type(S_TYPE))
    v = tl.load(row + 3).to(tl.pointer_type(S_TYPE))
    if ALIGNED:
        p, g = tl.multiple_of(p, 16), tl.multiple_of(g, 16)
        m, v = tl.multiple_of(m, 16), tl.multiple_of(v, 16)
    start = tl.multiple_of(start, BLOCK)
    at = start + tl.arange(0, BLOCK)
    inside = at < size
    if start + BLOCK <= size:
        adamw_part(
            p, g, m, v, GRAD_SCALE, at, inside, lr, b1, c1, b2, c2, eps, decay, bc1, bc2_root, HAS_SCALE, True
        )
    else:
        adamw_part(
            p,
            g,
            m,
            v,
            GRAD_SCALE,
            at,
            inside,
            lr,
            b1,
            c1,
            b2,
            c2,
            eps,
            decay,
            bc1,
            bc2_root,
            HAS_SCALE,
            False,
        )


@functools.lru_cache(maxsize=64)
def _tables(addresses: tuple[tuple[int, ...], ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """(TABLE, OWNER) of `adamw_many`; made again only when an address or a length changes."""
    owners = [
        (tensor, chunk)
        for tensor, row in enumerate(addresses)
        for chunk in range(triton.cdiv(row[4], MANY_CHUNK))
    ]
    both = torch.tensor(addresses), torch.tensor(owners, dtype=torch.int64).view(-1, 2)
    return both[0].to(device), both[1].to(device)


def launch_adamw_many(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor],
    grad_scale: Tensor | None, lr: float, beta1: float, beta2: float, eps: float, decay: float,
    bias_correction1: float, bias_correction2_root: float,
) -> None:  # fmt: skip
    """One launch for tensors of equal dtypes on one device."""
    given = list(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True))
    addresses = tuple((*(x.data_ptr() for x in four), four[0].numel()) for four in given if four[0].numel())
    if not addresses:
        return
    param, grad, moment = params[0], grads[0], exp_avgs[0]
    table, owner = _tables(addresses, param.device)
    with on_device(param):
        adamw_many[(owner.shape[0],)](
            table, owner, grad_scale, lr, beta1, 1.0 - beta1, beta2, 1.0 - beta2, eps, decay,
            bias_correction1, bias_correction2_root, P_TYPE=TRITON_TYPES[param.dtype],
            G_TYPE=TRITON_TYPES[grad.dtype], S_TYPE=TRITON_TYPES[moment.dtype],
            ALIGNED=all(address % 16 == 0 for row in addresses for address in row[:4]),
            HAS_SCALE=grad_scale is not None, BLOCK=MANY_CHUNK, num_warps=8,
        )  # fmt: skip
