"""Pre-CRMSNorm: hidden_size - 1 features in every parameter, and the function of Pre-LN (O1, O2, O4)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from llmnorm.modeling import LlmNormConfig, LlmNormForCausalLM, initialize_weights
from llmnorm.modeling.norms import crms_norm
from llmnorm.modeling.zero_mean import (
    ALIGNMENT,
    aligned,
    compress_reader,
    compress_writer,
    decompress,
    recenter,
    widen,
)

GOLDEN = json.loads((Path(__file__).parents[1] / "oracles" / "norms.json").read_text())
ConfigMaker = Callable[..., LlmNormConfig]
ModelMaker = Callable[..., LlmNormForCausalLM]
# 3 heads of 10 over one key-value head: 29 features, so 3 zeros behind them; 9 of 3: 8 features and none.
ODD = {"hidden_size": 30, "num_attention_heads": 3, "num_key_value_heads": 1}
NARROW = {"hidden_size": 9, "num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 4}


# fp64: the vector carries 8 digits. fp32: a few roundings of 6e-8 on values up to 1.5.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 1e-6)])
def test_o1_golden_crms_norm(dtype: torch.dtype, tolerance: float) -> None:
    x = torch.tensor(GOLDEN["x"], dtype=dtype)
    y = crms_norm((x - x.mean())[:3], torch.ones(3, dtype=dtype), GOLDEN["eps"])
    expected = torch.tensor(GOLDEN["crmsnorm"]["y"], dtype=dtype)
    torch.testing.assert_close(y, expected, rtol=0, atol=tolerance)
    whole = F.layer_norm(x, (4,), eps=GOLDEN["eps"])
    torch.testing.assert_close(y, whole[:3], rtol=0, atol=tolerance)


def test_o2_first_and_second_gradients_of_crms_norm() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 8, dtype=torch.float64, generator=generator, requires_grad=True)
    gain = torch.randn(5, dtype=torch.float64, generator=generator, requires_grad=True)
    assert torch.autograd.gradcheck(crms_norm, (x, gain, 1e-3))
    assert torch.autograd.gradgradcheck(crms_norm, (x, gain, 1e-3))


def test_what_lies_behind_the_features_is_not_read_and_gets_no_gradient() -> None:
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    x[:, 5:] = 1e6
    x.requires_grad_()
    gain = torch.linspace(0.5, 2, 5)
    y = crms_norm(x, gain, 1e-6)
    assert torch.equal(y[:, :5], crms_norm(x[:, :5].contiguous(), gain, 1e-6))
    assert torch.equal(y[:, 5:], torch.zeros(4, 3))
    y.sum().backward()
    assert torch.equal(x.grad[:, 5:], torch.zeros(4, 3))


def test_it_is_the_operator_of_llmnorm_kernels() -> None:
    kernels = pytest.importorskip("llmnorm_kernels")
    x = torch.randn(3, 7, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gain = torch.linspace(-1, 2, 11, dtype=torch.float64)
    # Both sum in fp64; the order of the sums may differ.
    torch.testing.assert_close(crms_norm(x, gain, 1e-6), kernels.crms_norm(x, gain, 1e-6), rtol=1e-14, atol=0)


def test_o4_compression_is_lossless_both_ways() -> None:
    generator = torch.Generator().manual_seed(0)
    x = recenter(torch.randn(5, 12, dtype=torch.float64, generator=generator), 1)
    compressed = compress_writer(x, 1)
    torch.testing.assert_close(compress_writer(decompress(compressed), 1), compressed, rtol=0, atol=1e-15)
    torch.testing.assert_close(decompress(compressed), x, rtol=0, atol=1e-14)
    reader = torch.randn(7, 12, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(compressed @ compress_reader(reader).T, x @ reader.T, rtol=0, atol=1e-13)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("sizes", [{}, ODD, NARROW], ids=["even", "odd", "narrow"])
def test_parameters_hold_one_feature_less_and_no_padding(
    make_config: ConfigMaker, sizes: dict[str, Any], tied: bool, bias: bool
) -> None:
    keys = {**sizes, "tie_word_embeddings": tied, "attention_bias": bias, "mlp_bias": bias}
    full = LlmNormForCausalLM(make_config(norm="pre_rmsnorm", **keys)).state_dict()
    config = make_config(norm="pre_crmsnorm", **keys)
    d = config.hidden_size
    readers = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")
    for name, tensor in LlmNormForCausalLM(config).state_dict().items():
        expected = list(full.pop(name).shape)
        on_rows = name.endswith(("o_proj.weight", "o_proj.bias", "down_proj.weight", "down_proj.bias"))
        on_rows = on_rows or name.endswith("norm.weight")
        on_columns = name.endswith((*readers, "embed_tokens.weight", "lm_head.weight"))
        dimension = 0 if on_rows else 1 if on_columns else None
        if dimension is not None:
            assert expected[dimension] == d, name
            expected[dimension] = d - 1
        assert list(tensor.shape) == expected, name
    assert not full


@pytest.mark.parametrize("sizes", [{}, ODD, NARROW], ids=["even", "odd", "narrow"])
def test_activations_have_an_aligned_width_and_zeros_in_it(
    make_model: ModelMaker, tokens: Tensor, sizes: dict[str, Any]
) -> None:
    model = make_model(norm="pre_crmsnorm", attention_bias=True, mlp_bias=True, **sizes)
    width = model.config.stream_width
    streams: list[Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, args, output: streams.append(output))
    last = model.model(tokens).last_hidden_state
    assert {stream.shape[-1] for stream in streams} == {aligned(width)}
    assert aligned(width) % ALIGNMENT == 0 and 0 <= aligned(width) - width < ALIGNMENT
    assert all(torch.equal(s[..., width:], torch.zeros_like(s[..., width:])) for s in streams)
    assert last.shape[-1] == width


@pytest.mark.parametrize("sizes", [{}, ODD, NARROW], ids=["even", "odd", "narrow"])
def test_o4_a_seed_gives_the_function_of_the_pre_ln_model_it_gives(
    make_config: ConfigMaker, tokens: Tensor, sizes: dict[str, Any]
) -> None:
    logits, gradients = [], []
    for norm in ("pre_ln", "pre_crmsnorm"):
        model = LlmNormForCausalLM(make_config(norm=norm, init="scaled_embed", **sizes))
        initialize_weights(model, seed=3)
        model.double()
        output = model(tokens, labels=tokens)
        output.loss.backward()
        logits.append(output.logits)
        gradients.append(model.model.layers[1].mlp.down_proj.weight.grad)
    # Weights are drawn in fp64-exact fp32 and cut down in fp32: roundings of 6e-8 per number.
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=2e-7 * logits[0].abs().max().item())
    # dL/dW = P^T [dL/dW~; 0]: the gradient of a writer is that of its compression, recentered.
    restored = recenter(F.pad(gradients[1], (0, 0, 0, 1)), 0)
    torch.testing.assert_close(gradients[0], restored, rtol=0, atol=1e-6 * restored.abs().max().item())


def test_gradients_are_those_of_the_unpadded_computation(make_model: ModelMaker, tokens: Tensor) -> None:
    """Against plain products of odd width: zeros behind the stream change no gradient."""
    model = make_model(norm="pre_crmsnorm", attention_bias=True, mlp_bias=True, **ODD).double()
    model(tokens, labels=tokens).loss.backward()
    padded = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.__class__ = torch.nn.Linear
    model.model.open_stream = lambda x: x
    model(tokens, labels=tokens).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(padded[name], parameter.grad, rtol=1e-11, atol=1e-14, msg=name)


def test_embeddings_come_and_go_with_the_width_of_the_parameters(
    make_model: ModelMaker, tokens: Tensor
) -> None:
    model = make_model(norm="pre_crmsnorm")
    embedded = model.get_input_embeddings()(tokens)
    assert torch.equal(model(inputs_embeds=embedded).logits, model(tokens).logits)
    model.resize_token_embeddings(70)
    assert model(tokens).logits.shape[-1] == 70
    assert torch.equal(widen(embedded, 32)[..., :31], embedded)


def test_it_mixes_with_no_other_norm(make_config: ConfigMaker) -> None:
    with pytest.raises(ValueError, match=r"pre_crmsnorm beside other norms.*one feature less than"):
        make_config(norm=["pre_crmsnorm", "pre_rmsnorm", "pre_crmsnorm"])
    assert make_config(norm=["pre_crmsnorm"] * 3).stream_width == 31
    with pytest.raises(ValueError, match="is not an option of norm=pre_crmsnorm"):
        make_config(norm="pre_crmsnorm", norm_options={"norm_type": "rmsnorm"})
