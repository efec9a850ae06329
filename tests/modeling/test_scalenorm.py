"""ScaleNorm: golden vectors, gradients. FixNorm: unit rows, logits that are g cos(angle), its mistakes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llmnorm.modeling import LlmNormForCausalLM, initialize_weights
from llmnorm.modeling.norms import ScaleNorm
from llmnorm.optim import create_optimizer, project_weights

ModelMaker = Callable[..., LlmNormForCausalLM]
GOLDEN = json.loads((Path(__file__).parents[1] / "oracles" / "norms.json").read_text())


# fp64: the vectors carry 8 digits. fp32: a few roundings of 6e-8 on values up to 3.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 1e-6)])
def test_o1_scalenorm_golden(dtype: torch.dtype, tolerance: float) -> None:
    golden = GOLDEN["scalenorm"]
    norm = ScaleNorm(4, 1e-5).to(dtype)
    torch.nn.init.constant_(norm.weight, golden["g"])
    x = torch.tensor(GOLDEN["x"], dtype=dtype, requires_grad=True)
    y = norm(x)
    y.backward(torch.tensor(GOLDEN["dy"], dtype=dtype))
    for name, value in (("y", y), ("dx", x.grad), ("dg", norm.weight.grad)):
        expected = torch.tensor(golden[name], dtype=dtype).reshape(value.shape)
        torch.testing.assert_close(value, expected, rtol=0, atol=tolerance, msg=name)


def test_o2_scalenorm_gradients() -> None:
    norm = ScaleNorm(5, 1e-3).double()
    x = torch.randn(2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    g = torch.tensor([1.7], dtype=torch.float64, requires_grad=True)
    function = lambda x, g: torch.func.functional_call(norm, {"weight": g}, (x,))  # noqa: E731
    assert torch.autograd.gradcheck(function, (x, g))
    assert torch.autograd.gradgradcheck(function, (x, g))


@pytest.mark.parametrize("tied", [False, True])
def test_fixnorm_rows_have_unit_length_after_every_step(
    make_config: Callable, tokens: Tensor, tied: bool
) -> None:
    config = make_config(norm="scalenorm", norm_options={"fixnorm": True}, tie_word_embeddings=tied)
    model = LlmNormForCausalLM(config)
    initialize_weights(model, seed=0)
    optimizer = create_optimizer("adamw", model, lr=1e-2)
    optimizer.register_step_post_hook(lambda *_: project_weights(model))
    for step in range(3):
        for table in (model.model.embed_tokens, model.lm_head):
            lengths = table.weight.detach().norm(dim=1)
            torch.testing.assert_close(lengths, torch.ones(61), rtol=0, atol=1e-6, msg=str(step))
        assert model.model.layers[0].self_attn.q_proj.weight.norm(dim=1).max() < 0.5  # the others are free
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_fixnorm_logits_are_g_times_the_cosine(make_model: ModelMaker, tokens: Tensor) -> None:
    """And the stream begins at sqrt(d) times the unit rows, without a parameter for it."""
    model = make_model(plain=True, norm="scalenorm", norm_options={"fixnorm": True})
    seen: list[Tensor] = []
    model.model.norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model.model.layers[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    logits = model(tokens).logits
    start, end = seen
    torch.testing.assert_close(start, math.sqrt(32) * model.model.embed_tokens(tokens))
    cosine = torch.nn.functional.cosine_similarity(end[:, :, None], model.lm_head.weight, dim=-1)
    torch.testing.assert_close(logits, model.model.norm.weight * cosine, rtol=1e-5, atol=1e-5)
    assert "model.embed_norm.scale" not in model.state_dict()


def test_fixnorm_mistakes(make_config: Callable) -> None:
    with pytest.raises(ValueError, match="norm lists scalenorm beside other norms, but it also keeps"):
        make_config(norm=["scalenorm", "pre_rmsnorm", "scalenorm"], norm_options={"fixnorm": True})
    make_config(norm=["scalenorm", "pre_rmsnorm", "scalenorm"])
    with pytest.raises(ValueError, match=r"norm_options\.fixnorm=1 must be true"):
        make_config(norm="scalenorm", norm_options={"fixnorm": 1})
