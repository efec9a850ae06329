"""torch.compile, block by block, in one graph each and with few graphs for many layers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from llmnorm.modeling import LlmNormForCausalLM

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


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["none", "full", "selective"])
@pytest.mark.parametrize("norm", ["pre_rmsnorm", "post_ln", "layernorm_scaling"])
def test_inductor(make_model: ModelMaker, tokens: Tensor, norm: str, mode: str) -> None:
    model = make_model(norm=norm).train()
    model.set_activation_checkpointing(mode)
    _compare(model, tokens, "inductor")
