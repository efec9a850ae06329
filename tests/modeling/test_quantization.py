"""4-bit operands: golden values, exact gradients of the quantized product, what is kept for backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from llmnorm.modeling import LlmNormConfig, LlmNormForCausalLM, initialize_weights
from llmnorm.modeling.quantization import (
    Quantization,
    QuantizedLinear,
    Quantizer,
    quantization_of,
    set_rounding_clock,
    settle_quantization,
)
from llmnorm_kernels import fake_quantize
from llmnorm_kernels.quantize import quantize_reference

V = torch.tensor([[0.9, -0.05, 0.31, -0.62, 0.11, 0.48, -0.27, 0.03]])
GOLDEN = {
    "released_fp4": (2, [0.9, 0, 0.36, -0.62, 0.12, 0.48, -0.24, 0]),
    "int4": (2, [0.9, -0.06857143, 0.34285714, -0.62, 0.13714286, 0.48, -0.27428571, 0]),
    "fp4": (0, [0.9, -0.075, 0.3, -0.6, 0.075, 0.45, -0.3, 0]),
    "asymmetric": (0, [0.912, 0, 0.304, -0.608, 0.10133333, 0.50666667, -0.304, 0]),
}


@pytest.mark.parametrize("grid", GOLDEN)
def test_o20_golden_values(grid: str) -> None:
    outliers, expected = GOLDEN[grid]
    torch.testing.assert_close(Quantizer(grid, 8, outliers)(V), torch.tensor([expected]), rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("grid", "kernel"),
    [("int4", "int4"), ("fp4", "fp4"), ("released_fp4", "uniform9"), ("asymmetric", "int4_asymmetric")],
)
@pytest.mark.parametrize("outliers", [0, 2])
def test_values_are_those_of_the_fused_operator(grid: str, kernel: str, outliers: int) -> None:
    if grid == "asymmetric" and outliers:
        pytest.skip("weights of this format have no outliers")
    x = torch.randn(6, 96, generator=torch.Generator().manual_seed(0))
    x[2, :32] = 0.0
    expected = fake_quantize(x, kernel, 32, outliers=outliers)
    torch.testing.assert_close(Quantizer(grid, 32, outliers)(x), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("grid", "levels"), [("released_fp4", 9), ("int4", 15), ("fp4", 15)])
def test_o20_number_of_levels_and_exact_outliers(grid: str, levels: int) -> None:
    x = torch.randn(1, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
    y = Quantizer(grid, 256, 2)(x)
    largest = x.abs().topk(2).indices
    assert torch.equal(y.gather(-1, largest), x.gather(-1, largest))
    body = y.scatter(-1, largest, 0.0)
    assert len(body.unique()) <= levels
    assert y.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("grid", "kernel"),
    [("int4", "int4"), ("fp4", "fp4"), ("released_fp4", "uniform9"), ("asymmetric", "int4_asymmetric")],
)
def test_numbers_rounded_at_random_are_those_of_the_fused_operator(grid: str, kernel: str) -> None:
    x = torch.randn(6, 96, generator=torch.Generator().manual_seed(0))
    words = (0x9ABCDEF1, 0x12345678)
    expected = quantize_reference(x, kernel, 32, 0, torch.tensor(words))
    drawn = Quantizer(grid, 32, 0)(x, words)
    torch.testing.assert_close(drawn, expected, rtol=1e-6, atol=1e-7)
    assert not torch.equal(drawn, Quantizer(grid, 32, 0)(x))


def test_flat_groups_cross_rows_and_rows_do_not() -> None:
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(2))
    flat, rows = Quantizer("int4", 16, 0, flat=True), Quantizer("int4", 8, 0)
    torch.testing.assert_close(flat(x), Quantizer("int4", 16, 0)(x.view(2, 16)).view(4, 8))
    assert torch.equal(rows(x)[1:2], rows(x[1:2]))


def test_flat_groups_need_no_width_and_the_last_may_be_short() -> None:
    x = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(4))
    quantizer = Quantizer("asymmetric", 16, 0, flat=True)
    whole = quantizer(x)
    assert whole.shape == x.shape
    padded = torch.cat((x.flatten(), torch.zeros(7))).view(-1, 16)
    assert torch.equal(whole.flatten(), Quantizer("asymmetric", 16, 0)(padded).flatten()[:105])
    keys = {"weights": "int4", "group_size": 20, "parity": "released"}
    model = LlmNormForCausalLM(LlmNormConfig(**SIZES, quantization=keys))
    assert model(TOKENS[:1, :1]).logits.isfinite().all()


def linears(count: int, quantization: Quantization, bias: bool = False) -> list[QuantizedLinear]:
    torch.manual_seed(0)
    return [QuantizedLinear.of(nn.Linear(32, 24, bias=bias), quantization) for _ in range(count)]


BOTH = Quantization(Quantizer("asymmetric", 16, 0), Quantizer("int4", 16, 2))


@pytest.mark.parametrize("bias", [False, True])
def test_o20_gradients_are_those_of_the_quantized_operands(bias: bool) -> None:
    (layer,) = linears(1, BOTH, bias)
    x = torch.randn(3, 5, 32, requires_grad=True)
    dy = torch.randn(3, 5, 24)
    y = layer(x)
    y.backward(dy)
    assert BOTH.weights is not None and BOTH.activations is not None
    wq, xq = BOTH.weights(layer.weight.detach()), BOTH.activations(x.detach())
    assert torch.equal(y.detach(), nn.functional.linear(xq, wq, layer.bias))
    assert torch.equal(x.grad, dy @ wq)
    assert torch.equal(layer.weight.grad, dy.reshape(-1, 24).T @ xq.reshape(-1, 32))
    if bias:
        torch.testing.assert_close(layer.bias.grad, dy.sum((0, 1)))


def kept_bytes(run: Callable[[], Tensor]) -> int:
    """Bytes of distinct storages that autograd keeps, parameters not counted."""
    seen: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if not isinstance(t, nn.Parameter):
            seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run().sum().backward()
    return sum(seen.values())


@pytest.mark.parametrize("autocast", [False, True])
def test_activations_are_kept_in_4_bits_once_for_all_their_readers(autocast: bool) -> None:
    spec = Quantization(Quantizer("asymmetric", 128, 0), Quantizer("int4", 128, 2))
    torch.manual_seed(0)
    layers = [QuantizedLinear.of(nn.Linear(256, 64, bias=False), spec) for _ in range(3)]
    dtype = torch.float32 if autocast else torch.bfloat16
    if not autocast:
        layers = [layer.bfloat16() for layer in layers]
    x = torch.randn(64, 256, dtype=dtype, requires_grad=True)

    def run() -> Tensor:
        z = x * 1.0
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            outputs = [layer(z) for layer in layers]
        return torch.cat(outputs, -1)

    # 4 bits, a 16-bit scale and two 24-bit outliers per 128 numbers.
    assert kept_bytes(run) == 64 * 256 * (4 + (16 + 2 * 24) / 128) / 8


SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def model(**keys) -> LlmNormForCausalLM:
    built = LlmNormForCausalLM(LlmNormConfig(**SIZES, **keys))
    initialize_weights(built, 1)
    return built


TOKENS = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(3))


def test_identity_formats_equal_the_unquantized_model_bit_for_bit() -> None:
    plain = model().train()
    same = model(quantization={"weights": "none", "activations": "none", "group_size": 16}).train()
    losses = [m(TOKENS, labels=TOKENS).loss for m in (plain, same)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    for a, b in zip(plain.parameters(), same.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_only_the_seven_projections_are_quantized() -> None:
    quantized = model(quantization={"group_size": 16})
    names = {n.rpartition(".")[2] for n, m in quantized.named_modules() if isinstance(m, QuantizedLinear)}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert quantized.state_dict().keys() == model().state_dict().keys()
    assert type(quantized.lm_head) is nn.Linear


@pytest.mark.parametrize("parity", [None, "released"])
@pytest.mark.parametrize("norm", ["pre_rmsnorm", "mix_ln"])
def test_a_saved_model_computes_what_it_was_trained_to(tmp_path, parity, norm) -> None:
    keys = {"quantization": {"weights": "fp4", "group_size": 16, "parity": parity}, "norm": norm}
    if norm == "mix_ln":
        keys["norm_options"] = {"post_fraction": 0.5}
    trained = model(**keys).eval()
    trained.save_pretrained(tmp_path)
    loaded = LlmNormForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config.quantization == trained.config.quantization
    assert torch.equal(loaded(TOKENS).logits, trained(TOKENS).logits)
    assert not torch.equal(
        model(**{**keys, "quantization": None}).eval()(TOKENS).logits, trained(TOKENS).logits
    )


def test_checkpointed_and_compiled_layers_have_the_same_gradients() -> None:
    gradients = []
    for mode in ("none", "full", "compiled"):
        m = model(quantization={"group_size": 16}).train()
        if mode == "full":
            m.set_activation_checkpointing("full")
        if mode == "compiled":
            for layer in m.model.layers:
                layer.compile(backend="aot_eager")
        m(TOKENS, labels=TOKENS, use_cache=False).loss.backward()
        gradients.append([p.grad for p in m.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(gradients[0], gradients[1], strict=True))
    for a, b in zip(gradients[0], gradients[2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_released_parity_means_the_released_grids() -> None:
    spec = quantization_of(
        settle_quantization({"weights": "fp4", "activations": "fp4", "parity": "released"})
    )
    assert spec == Quantization(*[Quantizer("released_fp4", 256, 2, flat=True)] * 2)
    spec = quantization_of(settle_quantization({"weights": "int4", "activations": "int4"}))
    assert spec == Quantization(Quantizer("asymmetric", 128, 0), Quantizer("int4", 128, 2))


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"weights": "int3"}, r"quantization.weights='int3' must be one of int4, fp4, none"),
        ({"rounding": "up"}, r"quantization.rounding='up' must be one of nearest, stochastic"),
        ({"bits": 4}, r"quantization.bits is not a key; known are weights, activations"),
        ({"group_size": 512}, r"quantization.group_size=512 must be an integer from 4 to 256"),
        ({"group_size": 20}, r"group_size=20 does not divide the 32 inputs of q_proj; 16 is the largest"),
        ({"group_size": 32}, r"group_size=32 does not divide the 48 inputs of down_proj; 24 is the largest"),
        ("int4", r"quantization='int4' must be null or a mapping"),
    ],
)
def test_mistakes_name_the_key_and_the_layer(quantization, message) -> None:
    with pytest.raises(ValueError, match=message):
        LlmNormConfig(**SIZES, quantization=quantization)


STOCHASTIC = {"group_size": 16, "rounding": "stochastic"}


def losses_and_gradients(m: LlmNormForCausalLM) -> list[Tensor]:
    m.zero_grad()
    loss = m(TOKENS, labels=TOKENS, use_cache=False).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in m.parameters())]


def test_stochastic_rounding_depends_on_the_clock_alone_and_a_layer_computed_again_draws_the_same() -> None:
    m = model(quantization=STOCHASTIC).train()
    set_rounding_clock(m, seed=3, step=5)
    torch.manual_seed(1)
    first = losses_and_gradients(m)
    torch.manual_seed(2)
    m.set_activation_checkpointing("full")
    again = losses_and_gradients(m)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for clock in ({"seed": 3, "step": 6}, {"seed": 4, "step": 5}):
        set_rounding_clock(m, **clock)
        assert not torch.equal(losses_and_gradients(m)[0], first[0])


def test_stochastic_gradients_see_the_operands_of_the_forward_pass() -> None:
    weights, activations = Quantizer("asymmetric", 16, 0), Quantizer("int4", 16, 2)
    layer = QuantizedLinear.of(
        nn.Linear(32, 24, bias=False), Quantization(weights, activations, stochastic=True), (4, "up_proj")
    )
    set_rounding_clock(layer, 0, 9)
    x, dy = torch.randn(5, 32, requires_grad=True), torch.randn(5, 24)
    y = layer.train()(x)
    y.backward(dy)
    wq = weights(layer.weight.detach(), layer._key("up_proj"))
    xq = activations(x.detach(), layer._key("input of gate_up"))
    assert torch.equal(y.detach(), xq @ wq.T)
    assert torch.equal(x.grad, dy @ wq)
    assert torch.equal(layer.weight.grad, dy.T @ xq)


def test_evaluation_rounds_to_nearest_whatever_training_does() -> None:
    nearest = model(quantization={"group_size": 16}).eval()
    drawn = model(quantization=STOCHASTIC)
    with pytest.raises(RuntimeError, match=r"call set_rounding_clock\(model, seed, step\) before it"):
        drawn.train()(TOKENS)
    set_rounding_clock(drawn, 0, 1)
    assert torch.equal(drawn.eval()(TOKENS).logits, nearest(TOKENS).logits)
    assert not torch.equal(drawn.train()(TOKENS).logits, nearest(TOKENS).logits)
