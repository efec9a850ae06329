"""The block-wise quantized AdamW in torch: its codes are those of the optimizer's state, its step torch's."""

from __future__ import annotations

import pytest
import torch
from blockwise_cases import beginning, move
from operator_calls import arguments, call

from llmnorm.optim.quantized_state import (
    BLOCK,
    Quantized,
    codebook,
    dequantize,
    nearest,
    quantize,
    quantized_zeros,
)
from llmnorm_kernels.blockwise import decode_blocks, encode_blocks_

CPU = torch.device("cpu")


@pytest.mark.parametrize("columns", [1, 127, 256, 601])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_those_of_the_state_to_the_last_bit(bits, signed, columns):
    x = torch.randn(5, columns, generator=torch.Generator().manual_seed(0))
    x = x * torch.logspace(-9, 3, columns) if signed else x.square()
    x[2] = 0
    values, cells = codebook(bits, signed, CPU)
    ours = quantized_zeros(x, bits)
    assert torch.equal(decode_blocks(*ours, values, BLOCK[bits], columns).abs(), torch.zeros_like(x))
    encode_blocks_(*ours, x, values, cells, BLOCK[bits])
    expected = quantize(x, bits, signed)
    assert torch.equal(ours.codes, expected.codes) and torch.equal(ours.absmax, expected.absmax)
    decoded = decode_blocks(*ours, values, BLOCK[bits], columns)
    assert torch.equal(decoded, dequantize(expected, bits, signed, columns))


def test_the_cells_find_what_a_binary_search_does():
    for bits in (8, 4):
        for signed in (True, False):
            values, cells = codebook(bits, signed, CPU)
            borders = (values[1:] + values[:-1]) / 2
            x = torch.cat([borders, borders.nextafter(torch.tensor(2.0)), borders.nextafter(-borders.abs())])
            x = x[None, :].clamp(-1, 1)
            x = torch.cat([x, torch.ones(1, 1)], 1)  # absmax 1, so that nothing is divided
            found, block = quantized_zeros(x, bits), 1024
            absmax = torch.zeros(1, 1)
            encode_blocks_(found.codes, absmax, x, values, cells, block)
            codes = (
                found.codes if bits == 8 else torch.stack((found.codes & 15, found.codes >> 4), -1).flatten(1)
            )
            search = torch.bucketize(x, borders).to(torch.uint8)
            assert absmax.item() == 1 and torch.equal(codes[:, : x.shape[1]], search)
            assert torch.equal(search, nearest(x, bits, signed))


@pytest.mark.parametrize("bits", [8, 4])
def test_the_first_step_is_torchs(bits):
    """From moments of zero nothing has been rounded yet."""
    start = torch.randn(6, 300, generator=torch.Generator().manual_seed(1))
    stock = torch.nn.Parameter(start.clone())
    stock.grad = torch.randn(6, 300, generator=torch.Generator().manual_seed(2))
    optimizer = torch.optim.AdamW([stock], lr=0.05, betas=(0.8, 0.95), weight_decay=0.1)
    optimizer.step()
    param, states = start.clone(), beginning(start, bits)
    move(param, stock.grad, states, bits, 1, betas=(0.8, 0.95))
    torch.testing.assert_close(param, stock.detach(), rtol=1e-6, atol=1e-6)
    held = optimizer.state[stock]
    for signed, key, codes, absmax in ((True, "exp_avg", *states[:2]), (False, "exp_avg_sq", *states[2:])):
        decoded = dequantize(Quantized(codes, absmax), bits, signed, 300)
        # Half of the widest gap of the map, in units of the block's maximum: 0.007 and 0.0035, in 4 bits 0.17
        # and 1/32 but for numbers below the least value, 1/16.
        gap = {8: 0.0071, 4: 0.17}[bits]
        blocks = absmax.repeat_interleave(BLOCK[bits], 1)[:, :300]
        assert ((decoded - held[key]).abs() <= gap * blocks).all()


def test_a_nan_reaches_its_block_and_no_other():
    param, grad = torch.ones(2, 600), torch.ones(2, 600)
    grad[1, 300] = float("nan")
    states = beginning(param, 8)
    move(param, grad, states, 8, 1)
    expected = torch.zeros(2, 3, dtype=torch.bool)
    expected[1, 1] = True
    assert torch.equal(states[1].isnan(), expected) and torch.equal(states[3].isnan(), expected)
    assert param.isnan().sum() == 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"block": 100}, "block=100 must be one of 32, 64"),
        ({"block": 128, "exp_avg_absmax": torch.zeros(4, 2)}, "exp_avg_absmax is .* of shape"),
        ({"step": 0}, "step=0 must count from 1"),
        ({"betas": (1.0, 0.9)}, "betas="),
        ({"seed": 1}, "stochastic rounding is for bfloat16"),
        ({"exp_avg_map": torch.zeros(16)}, r"exp_avg_codes is torch.uint8 \(4, 8\) .* 4 bits .* \(4, 4\)"),
        ({"exp_avg_sq_map": torch.zeros(16)}, r"exp_avg_sq_map is .* of shape \(256,\)"),
        ({"exp_avg_cells": torch.zeros(256, dtype=torch.int32)}, r"exp_avg_cells is .* of shape \(65536,\)"),
        ({"exp_avg_codes": torch.zeros(8, 4, dtype=torch.uint8).t()}, "exp_avg_codes is .* contiguous"),
    ],
)  # fmt: skip
def test_refused_inputs(wrong, message):
    tensors = arguments("adamw_blockwise_")
    tensors |= {key: value for key, value in wrong.items() if key in tensors}
    numbers = {key: value for key, value in wrong.items() if key not in tensors}
    before = {key: tensor.clone() for key, tensor in tensors.items()}
    with pytest.raises(ValueError, match=message):
        call("adamw_blockwise_", tensors, **numbers)
    assert all(torch.equal(tensor, before[key]) for key, tensor in tensors.items())
