"""The output projection and its cross entropy without the full logits.

    loss = sum_t w_t (lse_t - l_t,target + z_loss lse_t^2),   l = cap(x weight^T + bias)

Tokens are taken in chunks: a chunk's logits are computed (cuBLAS), turned into their gradient in place (one
kernel), and multiplied into dx and d weight at once, so that memory is chunk x vocabulary instead of tokens x
vocabulary and backward only scales what forward made. d weight accumulates over the chunks in float32, inside
the matrix product on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .checks import check_floats, check_given, check_vector
from .cross_entropy import check_targets, reduce_losses, token_losses_reference
from .dispatch import accumulator, library, operator, runs_triton

# Bytes of one chunk's logits. A smaller chunk pays more for adding into d weight (244 / chunk of the matrix
# time on an H200): below 2,048 tokens that is more than a tenth, so no chunk is smaller than that.
CHUNK_BYTES = 256 << 20
SMALLEST_CHUNK = 2048


def chunk_size(tokens: int, vocabulary: int, element_size: int) -> int:
    """Tokens per chunk: what fits CHUNK_BYTES, at least 2,048, evened out over the chunks."""
    most = max(SMALLEST_CHUNK, CHUNK_BYTES // (vocabulary * element_size))
    chunks = max(1, -(-tokens // most))
    return max(1, -(-tokens // chunks))


def _loss_and_gradient(
    logits: Tensor, target: Tensor, weights: Tensor | None, ignore_index: int, softcap: float, z_loss: float,
    gradient: bool, triton: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(weighted losses of a chunk, weighted d loss / d logits); the second may be the storage of the first
    argument."""
    if triton:
        from .cross_entropy_kernels import loss_and_gradient_in_place

        losses = loss_and_gradient_in_place(logits, target, weights, ignore_index, softcap, z_loss, gradient)
        return losses, logits
    losses = token_losses_reference(logits, target, ignore_index, softcap, z_loss)
    share = (target != ignore_index).to(losses.dtype)
    if weights is not None:
        share = share * weights.to(losses.dtype)
    losses = losses * share
    if not gradient:
        return losses, logits
    # By hand: autograd does not record below the dispatcher, where this op runs.
    capped = logits.to(losses.dtype)
    if softcap > 0.0:
        capped = softcap * torch.tanh(capped / softcap)
    lse = torch.logsumexp(capped, -1, keepdim=True)
    slope = torch.exp(capped - lse) * (1.0 + 2.0 * z_loss * lse)
    picked = torch.where(target == ignore_index, 0, target).long().unsqueeze(-1)
    slope.scatter_add_(-1, picked, slope.new_full((1, 1), -1.0).expand(len(target), 1))
    if softcap > 0.0:
        slope *= 1.0 - (capped / softcap) ** 2
    return losses, (slope * share.unsqueeze(-1)).to(logits.dtype)


def _accumulate(total: Tensor, gradient: Tensor, x: Tensor) -> None:
    """total += gradient^T x, summed in the dtype of total."""
    if total.dtype == x.dtype:
        total.addmm_(gradient.t(), x)
    elif x.is_cuda:
        torch.addmm(total, gradient.t(), x, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(gradient.t().to(total.dtype), x.to(total.dtype))


def chunked(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, weights: Tensor | None, ignore_index: int,
    softcap: float, z_loss: float, chunk: int, gradient: bool, triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(token losses, dx, d weight in the accumulator dtype, d bias) for unit upstream gradients; the last
    three are empty without `gradient`."""
    tokens, vocabulary = x.shape[0], weight.shape[0]
    acc = accumulator(x.dtype)
    losses = x.new_empty(tokens, dtype=acc)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if gradient else x.new_empty(0)
    dweight = x.new_zeros(weight.shape if gradient else 0, dtype=acc)
    dbias = x.new_zeros(vocabulary if gradient and bias is not None else 0, dtype=acc)
    for start in range(0, tokens, chunk):
        part = slice(start, start + chunk)
        logits = x[part] @ weight.t() if bias is None else torch.addmm(bias, x[part], weight.t())
        share = None if weights is None else weights[part]
        losses[part], slope = _loss_and_gradient(
            logits, target[part], share, ignore_index, softcap, z_loss, gradient, triton
        )
        if gradient:
            torch.mm(slope, weight, out=dx[part])
            _accumulate(dweight, slope, x[part])
            if bias is not None:
                dbias += slope.sum(0, dtype=acc)
    return losses, dx, dweight, dbias


def _fake(x, weight, bias, target, weights, ignore_index, softcap, z_loss, chunk, gradient, triton):
    acc = accumulator(x.dtype)
    return (
        x.new_empty(x.shape[0], dtype=acc),
        x.new_empty(x.shape if gradient else 0),
        x.new_empty(weight.shape if gradient else 0, dtype=acc),
        x.new_empty(weight.shape[0] if gradient and bias is not None else 0, dtype=acc),
    )


# Not through `register`: the chunks are torch code around one kernel, and the torch backend runs them as
# well.
library.define(
    "linear_cross_entropy(Tensor x, Tensor weight, Tensor? bias, Tensor target, Tensor? weights, "
    "int ignore_index, float softcap, float z_loss, int chunk, bool gradient, bool triton) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
for _key in ("CUDA", "CPU"):
    library.impl("linear_cross_entropy", chunked, _key)
torch.library.register_fake("llmnorm_kernels::linear_cross_entropy", _fake, lib=library)


class _LinearLoss(torch.autograd.Function):
    """The summed loss, or the loss of each token, for which backward runs the chunks again with the upstream
    gradients."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, weights: Tensor | None,
        ignore_index: int, softcap: float, z_loss: float, chunk: int, each: bool, triton: bool,
    ) -> Tensor:  # fmt: skip
        wanted = any(ctx.needs_input_grad[:3])
        options = (ignore_index, softcap, z_loss, chunk)
        losses, dx, dweight, dbias = torch.ops.llmnorm_kernels.linear_cross_entropy(
            x, weight, bias, target, weights, *options, wanted and not each, triton
        )
        ctx.each, ctx.options, ctx.triton = each, options, triton
        ctx.dtypes = (weight.dtype, None if bias is None else bias.dtype)
        if each:
            ctx.save_for_backward(x, weight, bias, target, weights)
            return losses
        ctx.save_for_backward(dx, dweight, dbias)
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, up: Tensor) -> Any:
        if ctx.each:
            x, weight, bias, target, weights = ctx.saved_tensors
            share = up if weights is None else up * weights.to(up.dtype)
            _, dx, dweight, dbias = torch.ops.llmnorm_kernels.linear_cross_entropy(
                x, weight, bias, target, share, *ctx.options, True, ctx.triton
            )
        else:
            # up has one element but one dimension, so that the product is taken in its float32 and rounded
            # once.
            up = up.reshape(1)
            dx, dweight, dbias = (torch.mul(t, up, out=torch.empty_like(t)) for t in ctx.saved_tensors)
        dtype, bias_dtype = ctx.dtypes
        return dx, dweight.to(dtype), None if bias_dtype is None else dbias.to(bias_dtype), *(None,) * 8


@operator
def linear_cross_entropy(
    x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None, *, ignore_index: int = -100,
    softcap: float | None = None, z_loss: float = 0.0, weights: Tensor | None = None, reduction: str = "mean",
    chunk: int | None = None,
) -> Tensor:  # fmt: skip
    """cross_entropy(x weight^T + bias, target, ...) without the logits in memory, with exact gradients.

    x: (..., width); weight: (vocabulary, width), of the dtype of x; target: (...); bias: (vocabulary,). Under
    autocast, x, weight and bias are cast as `torch.nn.functional.linear` casts them. Logits have the dtype of
    x (as those of an HF model), their softmax float32. Other arguments as in `cross_entropy`; chunk: tokens
    per chunk, by default from a memory budget of 256 MB. Matrix work 6 T width V FLOPs, all of it in forward
    (8 with reduction="none"); logits traffic 12 bytes per token and vocabulary entry. Raises ValueError as
    `cross_entropy` does.
    """
    check_given(x=x, weight=weight, target=target)
    check_floats(x=x, weight=weight, bias=bias, weights=weights)
    if weight.dim() != 2 or x.dim() == 0 or x.shape[-1] != weight.shape[1] or 0 in weight.shape:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}; it must be (vocabulary, width), neither zero, "
            f"for x of shape (..., width) = {tuple(x.shape)}"
        )
    check_vector("bias", bias, weight.shape[0], "the logits")
    check_targets(target, x.shape[:-1], ignore_index, softcap, z_loss, weights, reduction)
    if target.device != x.device:
        raise ValueError(f"target is on {target.device} but x is on {x.device}; move them together")
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if weight.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
        raise ValueError(
            f"weight has dtype {weight.dtype} but x has {x.dtype}; cast one of them or use autocast"
        )
    tokens = x.reshape(-1, x.shape[-1])
    if chunk is None:
        chunk = chunk_size(tokens.shape[0], weight.shape[0], x.element_size())
    elif chunk < 1:
        raise ValueError(f"chunk={chunk} must be at least 1 token")
    losses = _LinearLoss.apply(
        tokens, weight, bias, target.reshape(-1).contiguous(),
        None if weights is None else weights.reshape(-1).contiguous(), ignore_index, softcap or 0.0,
        float(z_loss), chunk, reduction == "none", runs_triton(x),
    )  # fmt: skip
    return reduce_losses(losses, target, ignore_index, reduction)
