"""Block-wise dynamic quantization, INT4 bases and AdamW in 8 and 4 bits."""

from __future__ import annotations

import pytest
import torch

from llmnorm.optim.adamw8bit import AdamW8bit
from llmnorm.optim.galore import GaLore
from llmnorm.optim.quantized_state import (
    dequantize,
    dynamic_map,
    nearest,
    pack_int4,
    quantize,
    unpack_int4,
)

EXAMPLE = torch.tensor([[0.001, -0.5, 0.25, 1.0, -1.0, 3e-5, 0.0, 0.7]])


def test_o19_the_8_bit_maps_have_the_published_constants():
    signed, unsigned = dynamic_map(8, True), dynamic_map(8, False)
    for values in (signed, unsigned):
        assert len(values) == 256 and (values.diff() > 0).all()
    assert signed[127] == 0
    torch.testing.assert_close(signed[:4], torch.tensor([-0.99296875, -0.97890625, -0.96484375, -0.95078125]))
    torch.testing.assert_close(signed[128:132], torch.tensor([5.5e-7, 3.25e-6, 7.75e-6, 2.125e-5]))
    torch.testing.assert_close(signed[-4:], torch.tensor([0.96484375, 0.97890625, 0.99296875, 1.0]))
    assert signed.double().sum().item() == pytest.approx(1.0, abs=1e-6)
    assert signed.double().square().sum().item() == pytest.approx(48.5958375, abs=1e-5)
    torch.testing.assert_close(unsigned[:4], torch.tensor([0.0, 3.25e-7, 7.75e-7, 2.125e-6]))
    assert unsigned.double().sum().item() == pytest.approx(75.1052631, abs=1e-5)
    assert unsigned.double().square().sum().item() == pytest.approx(48.5974518, abs=1e-5)


def test_o19_the_4_bit_maps():
    levels = [0.0055, 0.0325, 0.0775, 0.2125, 0.4375, 0.6625, 0.8875]
    expected = torch.tensor(sorted([-v for v in levels] + levels + [0.0, 1.0]))
    torch.testing.assert_close(dynamic_map(4, True), expected)
    torch.testing.assert_close(dynamic_map(4, False), torch.arange(1, 17) / 16)


def test_golden_codes():
    packed = quantize(EXAMPLE, 8, signed=True)
    assert packed.codes.tolist() == [[142, 35, 201, 255, 0, 131, 127, 233]]
    expected = [0.00094375, -0.50078125, 0.24765625, 1.0, -0.99296875, 0.00002125, 0.0, 0.69765625]
    torch.testing.assert_close(dequantize(packed, 8, True, 8), torch.tensor([expected]))
    packed = quantize(EXAMPLE, 4, signed=True)
    codes = torch.stack((packed.codes & 15, packed.codes >> 4), -1).flatten()
    assert codes.tolist() == [7, 2, 11, 15, 0, 7, 7, 13]
    expected = [0.0, -0.4375, 0.2125, 1.0, -0.8875, 0.0, 0.0, 0.6625]
    torch.testing.assert_close(dequantize(packed, 4, True, 8), torch.tensor([expected]))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_those_of_a_binary_search_to_the_last_bit(bits, signed):
    values = dynamic_map(bits, signed)
    borders = (values[1:] + values[:-1]) / 2
    generator = torch.Generator().manual_seed(0)
    decades = 10.0 ** (-8 * torch.rand(20_000, generator=generator))
    signs = torch.randint(0, 2, decades.shape, generator=generator) * 2 - 1
    x = torch.cat(
        [
            borders,
            borders.nextafter(torch.tensor(2.0)),
            borders.nextafter(torch.tensor(-2.0)),
            values,
            torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1.0, -1.0]),
            decades * signs,
        ]
    )
    x = x if signed else x.abs()
    assert torch.equal(nearest(x, bits, signed).long(), torch.bucketize(x, borders))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("columns", [1, 127, 256, 300, 513])
def test_values_of_the_map_come_back_and_the_largest_is_exact(bits, signed, columns):
    values = dynamic_map(bits, signed)
    x = values[torch.randint(0, len(values), (3, columns), generator=torch.Generator().manual_seed(0))]
    x[:, :: 256 if bits == 8 else 128] = 1.0  # the maximum of every block
    x = x * 37.0
    torch.testing.assert_close(
        dequantize(quantize(x, bits, signed), bits, signed, columns), x, rtol=1e-6, atol=0
    )


@pytest.mark.parametrize(("signed", "bound"), [(True, 0.06), (False, 0.03)])
def test_o19_relative_error_in_the_first_decade(signed, bound):
    x = torch.rand(4, 256, generator=torch.Generator().manual_seed(0)) * 0.9 + 0.1
    error = (dequantize(quantize(x, 8, signed), 8, signed, 256) - x).abs() / x
    assert 0.5 * bound < error.max() <= bound * 1.08


def test_blocks_follow_rows_so_that_a_shard_is_quantized_as_the_whole():
    x = torch.randn(6, 300, generator=torch.Generator().manual_seed(0))
    whole, shard = quantize(x, 8, True), quantize(x[2:5], 8, True)
    assert torch.equal(whole.codes[2:5], shard.codes) and torch.equal(whole.absmax[2:5], shard.absmax)
    assert torch.equal(dequantize(quantize(torch.zeros(2, 5), 8, True), 8, True, 5), torch.zeros(2, 5))


def test_int4_golden_and_half_a_byte_per_element():
    v = torch.tensor([[0.9, -0.05, 0.31, -0.62, 0.11, 0.48, -0.27, 0.03]])
    packed = pack_int4(v)
    assert packed.codes.shape == (1, 4) and packed.codes.dtype == torch.uint8
    torch.testing.assert_close(packed.scale, torch.tensor([[0.101333333]]))
    assert packed.zero.tolist() == [[6]]
    expected = [0.912, 0.0, 0.304, -0.608, 0.10133333, 0.50666667, -0.304, 0.0]
    torch.testing.assert_close(unpack_int4(packed, 8), torch.tensor([expected]))
    x = torch.randn(3, 513, generator=torch.Generator().manual_seed(0))
    again = unpack_int4(pack_int4(x), 513)
    assert ((again - x).abs() <= pack_int4(x).scale.repeat_interleave(256, -1)[:, :513] * 0.51).all()


def state_bytes(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> int:
    state = optimizer.state[parameter]
    return sum(v.numel() * v.element_size() for k, v in state.items() if k != "step")


def step(optimizer: torch.optim.Optimizer, parameter: torch.Tensor, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_o21_state_bytes_are_those_of_the_formulas(dtype):
    m, n, r = 96, 64, 16
    weight = torch.zeros(m, n, dtype=dtype, requires_grad=True)
    size = dtype.itemsize
    for optimizer, expected in [
        (AdamW8bit([weight], state_bits=8), 2 * m * n + 2 * m * 4),
        (AdamW8bit([weight], state_bits=4), m * n + 2 * m * 4),
        (GaLore([weight], rank=r), 4 * n * r + 2 * m * r * size),
        (GaLore([weight], rank=r, side="auto"), 4 * m * r + 2 * n * r * size),
        (GaLore([weight], rank=r, projection="random"), 2 * m * r * size),
        (GaLore([weight], rank=r, projection_bits=4), r * n // 2 + 5 * r + 2 * m * r * size),
    ]:
        step(optimizer, weight, 0)
        assert state_bytes(optimizer, weight) == expected
        group = optimizer.param_groups[0]
        assert optimizer.state_bytes(group, weight) == expected + 4  # and the count of steps


def test_8_bit_low_rank_moments_of_a_large_matrix():
    weight = torch.zeros(256, 128, requires_grad=True)
    optimizer = GaLore([weight], rank=32, state_bits=8)
    step(optimizer, weight, 0)
    assert optimizer.state[weight]["exp_avg_codes"].dtype == torch.uint8
    assert state_bytes(optimizer, weight) == 4 * 128 * 32 + 2 * 256 * 32 + 2 * 256 * 4


@pytest.mark.parametrize(("bits", "bound"), [(8, 0.03), (4, 0.25)])
def test_quantized_adamw_stays_near_adamw(bits, bound):
    """Mean distance after 20 steps, relative to the distance walked: rounding of moments, no drift."""
    start = torch.zeros(64, 128)
    ours, theirs = start.clone().requires_grad_(), start.clone().requires_grad_()
    quantized = AdamW8bit([("w", ours)], lr=0.01, state_bits=bits)
    reference = torch.optim.AdamW([theirs], lr=0.01, weight_decay=0.0)
    for seed in range(20):
        step(quantized, ours, seed)
        step(reference, theirs, seed)
    distance = (ours - theirs).detach().norm() / theirs.detach().norm()
    assert 0 < distance < bound


def test_small_matrices_and_embeddings_keep_plain_moments():
    small, table = torch.zeros(8, 16, requires_grad=True), torch.zeros(128, 64, requires_grad=True)
    for quantize_embeddings in (False, True):
        optimizer = AdamW8bit(
            [
                {"params": [("s", small)], "role": "hidden_matrix"},
                {"params": [("e", table)], "role": "embedding"},
            ],
            quantize_embeddings=quantize_embeddings,
        )
        step(optimizer, small, 0)
        step(optimizer, table, 0)
        assert optimizer.state[small]["exp_avg"].dtype == torch.float32
        assert ("exp_avg_codes" in optimizer.state[table]) == quantize_embeddings
