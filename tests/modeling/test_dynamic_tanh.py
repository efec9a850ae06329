"""DyT: golden vectors, gradients, dtypes, where it starts, and the layers written out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmnorm.modeling import LlmNormForCausalLM
from llmnorm.modeling.dynamic_tanh import DynamicTanh, dynamic_tanh

ModelMaker = Callable[..., LlmNormForCausalLM]
GOLDEN = json.loads((Path(__file__).parents[1] / "oracles" / "norms.json").read_text())


# fp64: the vectors carry 8 digits. fp32: a few roundings of 6e-8 on values up to 2.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 1e-6)])
def test_o1_dynamic_tanh_golden(dtype: torch.dtype, tolerance: float) -> None:
    golden = GOLDEN["dyt"]
    x, gain, alpha = (
        torch.tensor(values, dtype=dtype, requires_grad=True)
        for values in (GOLDEN["x"], GOLDEN["gain"], [golden["alpha"]])
    )
    shift = torch.tensor(GOLDEN["shift"], dtype=dtype)  # the vectors have DyT's shift, which its LLaMA drops
    y = dynamic_tanh(x, alpha, gain)
    y.backward(torch.tensor(GOLDEN["dy"], dtype=dtype))
    for name, value in (("y", y + shift), ("dx", x.grad), ("dalpha", alpha.grad)):
        expected = torch.tensor(golden[name], dtype=dtype).reshape(value.shape)
        torch.testing.assert_close(value, expected, rtol=0, atol=tolerance, msg=name)


def test_o2_first_and_second_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    x, gain = (torch.randn(shape, dtype=torch.float64, generator=generator) for shape in ((2, 3, 5), (5,)))
    inputs = (x, torch.tensor([0.7], dtype=torch.float64), gain)
    for tensor in inputs:
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(dynamic_tanh, inputs)
    assert torch.autograd.gradgradcheck(dynamic_tanh, inputs)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_dtype_follows_x_with_one_rounding(weight_dtype: torch.dtype) -> None:
    norm = DynamicTanh(64, 1e-6, place="attention", alpha=0.7)
    torch.manual_seed(0)
    torch.nn.init.normal_(norm.weight, mean=1.0)
    norm.to(weight_dtype)
    x = torch.randn(8, 64).to(torch.bfloat16).requires_grad_()
    y = norm(x)
    y.float().sum().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16
    assert norm.alpha.grad.dtype == norm.weight.grad.dtype == weight_dtype
    exact = dynamic_tanh(x.detach().double(), norm.alpha.double(), norm.weight.double())
    # One rounding to bf16's 8 bits, on top of fp32's.
    torch.testing.assert_close(y.double(), exact, rtol=2.0**-8 + 1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("hidden_size", "attention", "other"),
    [(2048, 0.5, 0.5), (4096, 0.8, 0.2), (5120, 0.6, 0.15), (6144, 0.6, 0.15), (8192, 0.2, 0.05)],
)
def test_published_alpha(hidden_size: int, attention: float, other: float) -> None:
    with torch.device("meta"):
        norms = [DynamicTanh(hidden_size, 1e-6, place=place) for place in ("attention", "other")]
    assert [norm.initial_values["alpha"] for norm in norms] == [attention, other]


def test_given_alphas_go_to_their_places_and_the_embedding_starts_at_sqrt_d(make_model: ModelMaker) -> None:
    model = make_model(plain=True, norm="dyt", norm_options={"attention_alpha": 1, "other_alpha": 0.25})
    state = model.state_dict()
    for name, value in state.items():
        if name.endswith(".alpha"):
            expected = 1.0 if "input_layernorm" in name else 0.25
            assert torch.equal(value, torch.tensor([expected])), name
    assert sum(name.endswith(".alpha") for name in state) == 7
    torch.testing.assert_close(state["model.embed_norm.scale"], torch.tensor([32**0.5]))


def test_the_layers_written_out(make_model: ModelMaker, tokens: Tensor) -> None:
    """s E; x + f(gain tanh(alpha x)); gain tanh(alpha x) before the head."""
    model = make_model(norm="dyt")

    def curve(norm: Any, x: Tensor) -> Tensor:
        return norm.weight * torch.tanh(norm.alpha * x)

    x = model.model.embed_norm.scale * model.model.embed_tokens(tokens)
    positions = tuple(p.unsqueeze(1) for p in model.model.rotary_emb(x, torch.arange(12)[None]))
    for layer in model.model.layers:
        x = x + layer.self_attn(curve(layer.input_layernorm, x), positions)[0]
        x = x + layer.mlp(curve(layer.post_attention_layernorm, x))
    expected = model.lm_head(curve(model.model.norm, x))
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-5, atol=1e-5)


def test_mistakes(make_config: Callable) -> None:
    with pytest.raises(ValueError, match=r"norm_options\.other_alpha=0 must be null \(the published value"):
        make_config(norm="dyt", norm_options={"other_alpha": 0})
    with pytest.raises(ValueError, match=r"norm_options\.norm_type is not an option of norm=dyt"):
        make_config(norm="dyt", norm_options={"norm_type": "rmsnorm"})
