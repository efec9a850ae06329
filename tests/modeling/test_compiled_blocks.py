"""torch.compile, block by block, in one graph each and with few graphs for many layers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from llmnorm.modeling import LlmNormForCausalLM
from llmnorm.modeling.norms import make_norm

ModelMaker = Callable[..., LlmNormForCausalLM]


def _compare(model: LlmNormForCausalLM, tokens: Tensor, backend: CompileCounterWithBackend | str) -> None:
    expected = model(tokens, labels=tokens, use_cache=False).loss
    expected.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    torch._dynamo.reset()
    for layer in model.model.layers:
        layer.compile(fullgraph=True, backend=backend)
    loss = model(tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    for name, parameter in model.named_parameters():
        scale = gradients[name].abs().max().item()
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=0, atol=1e-5 * scale, msg=name)


# Layers that differ by kind need a graph each; the factors of LNS need three, whatever the depth: 1, the
# first other one, and one graph for all that follow.
@pytest.mark.parametrize(
    ("norm", "mode", "graphs"),
    [("mix_ln", "none", 2), ("layernorm_scaling", "selective", 3)],
)
def test_one_graph_per_kind_of_layer(
    make_model: ModelMaker, tokens: Tensor, norm: str, mode: str, graphs: int
) -> None:
    model = make_model(norm=norm, num_hidden_layers=6).train()
    model.set_activation_checkpointing(mode)
    counter = CompileCounterWithBackend("aot_eager")
    _compare(model, tokens, counter)
    assert counter.frame_count == graphs


def test_norm_gradients_stay_fp32_under_autocast() -> None:
    """Autocast must not reach the sums inside the backward, eager or compiled."""
    torch.manual_seed(0)
    norm = make_norm("rmsnorm", 64, 1e-6)
    torch.nn.init.normal_(norm.weight)
    x, dy = torch.randn(2, 8, 64, requires_grad=True), torch.randn(2, 8, 64)
    expected = torch.autograd.grad(norm(x), (x, norm.weight), dy)
    torch._dynamo.reset()
    for function in (norm, torch.compile(norm, backend="aot_eager", fullgraph=True)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            gradients = torch.autograd.grad(function(x), (x, norm.weight), dy)
        for gradient, exact in zip(gradients, expected, strict=True):
            torch.testing.assert_close(gradient, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["none", "full", "selective"])
@pytest.mark.parametrize("norm", ["pre_rmsnorm", "post_ln", "layernorm_scaling"])
def test_inductor(make_model: ModelMaker, tokens: Tensor, norm: str, mode: str) -> None:
    model = make_model(norm=norm).train()
    model.set_activation_checkpointing(mode)
    _compare(model, tokens, "inductor")
