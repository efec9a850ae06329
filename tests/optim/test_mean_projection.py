"""O4: a recentered Pre-RMSNorm under the mean-projected step moves exactly as Pre-LN does, in fp64."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

from llmnorm.modeling import LlmNormConfig, LlmNormForCausalLM, initialize_weights
from llmnorm.modeling.zero_mean import RecenteredWriter, recenter
from llmnorm.optim import create_optimizer, project_gradients, project_weights

STEPS, CLIP = 25, 0.5
WRITERS = ("o_proj.weight", "o_proj.bias", "down_proj.weight", "down_proj.bias")


def build(norm: str, tied: bool, recentered: bool = False) -> LlmNormForCausalLM:
    """3 query heads over 1 key-value head, biases on every projection, random gains and shifts."""
    config = LlmNormConfig(
        vocab_size=41,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=tied,
        norm=norm,
        norm_options={"recentered": True} if recentered else {},
    )
    model = LlmNormForCausalLM(config)
    initialize_weights(model, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.double().parameters():
            size = 0.2 if parameter.ndim == 1 else 0.1
            parameter.add_(size * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    if recentered:
        project_weights(model)
    return model


def loss_of(model: LlmNormForCausalLM, seed: int) -> Tensor:
    """In fp64; transformers' own loss would round the logits to fp32."""
    ids = torch.randint(0, 41, (4, 17), generator=torch.Generator().manual_seed(seed))
    logits = model(ids[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def train(
    model: LlmNormForCausalLM,
    optimizer: Optimizer,
    steps: range,
    gradients: bool = True,
    weights: bool = True,
) -> list[float]:
    """The loss before each update, clipped by the global norm and projected as asked."""
    losses = []
    for step in steps:
        loss = loss_of(model, step % 3)
        loss.backward()
        if gradients:
            project_gradients(model)
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        if weights:
            project_weights(model)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def adamw(model: LlmNormForCausalLM) -> Optimizer:
    return create_optimizer("adamw", model, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)


def sgd(model: LlmNormForCausalLM) -> Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def distance(pre_ln: LlmNormForCausalLM, recentered: LlmNormForCausalLM) -> float:
    """Largest difference of a weight from the one it should be: P W for writers, W for the others."""
    theirs = recentered.state_dict()
    return max(
        float(((recenter(tensor, 0) if name.endswith(WRITERS) else tensor) - theirs[name]).abs().max())
        for name, tensor in pre_ln.state_dict().items()
    )


def switched(tied: bool, make: Callable[[LlmNormForCausalLM], Optimizer], **projections: bool) -> tuple:
    """(both losses, distance) after 5 steps of Pre-LN and 25 more of it and of the model it is turned into,
    whose optimizer got the same state."""
    pre_ln, recentered = build("pre_ln", tied), build("pre_rmsnorm", tied, recentered=True)
    optimizer = make(pre_ln)
    train(pre_ln, optimizer, range(5))
    recentered.load_state_dict(pre_ln.state_dict())
    project_weights(recentered)
    other = make(recentered)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch would share the tensors
    steps = range(5, 5 + STEPS)
    expected, measured = train(pre_ln, optimizer, steps), train(recentered, other, steps, **projections)
    return expected, measured, distance(pre_ln, recentered)


@pytest.mark.parametrize("make", [adamw, sgd])
@pytest.mark.parametrize("tied", [False, True])
def test_o4_training_goes_on_as_if_nothing_had_happened(
    tied: bool, make: Callable[[LlmNormForCausalLM], Optimizer]
) -> None:
    expected, measured, apart = switched(tied, make)
    assert expected[-1] < expected[0] - 0.1
    # The bound: 25 updates of 1e-2, which add up a few thousand roundings of 1e-16.
    assert max(abs(a - b) for a, b in zip(expected, measured, strict=True)) < 1e-12
    assert apart < 1e-11


# Without the projection of the gradient, moments and global norm are not Pre-LN's; without that of the
# weights, Adam's update has a mean, which RMSNorm sees.
@pytest.mark.parametrize(
    "projections", [{"gradients": False}, {"weights": False}], ids=["weights", "gradients"]
)
def test_o4_half_of_the_step_is_not_enough(projections: dict[str, bool]) -> None:
    expected, measured, apart = switched(False, adamw, **projections)
    assert max(abs(a - b) for a, b in zip(expected, measured, strict=True)) > 1e-6
    assert apart > 1e-5


def test_gradients_of_pre_ln_have_no_mean_and_those_of_rmsnorm_lose_theirs() -> None:
    pre_ln, recentered = build("pre_ln", True), build("pre_rmsnorm", True, recentered=True)
    recentered.load_state_dict(pre_ln.state_dict())
    project_weights(recentered)
    for model in (pre_ln, recentered):
        loss_of(model, 0).backward()
    project = {name: p.grad.clone() for name, p in recentered.named_parameters()}
    project_gradients(recentered)
    raw = 0.0
    for name, parameter in pre_ln.named_parameters():
        ours = recentered.get_parameter(name).grad
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-10, atol=1e-14, msg=name)
        if name.endswith(WRITERS):
            assert parameter.grad.mean(0).abs().max() < 1e-15
            raw = max(raw, float(project[name].mean(0).abs().max() / project[name].abs().max()))
    assert raw > 0.01  # so there was something to remove


def test_only_the_writers_of_a_recentered_model_are_projected() -> None:
    plain, recentered = build("pre_rmsnorm", False), build("pre_rmsnorm", False, recentered=True)
    assert not any(isinstance(module, RecenteredWriter) for module in plain.modules())
    projected = {name for name, m in recentered.named_modules() if isinstance(m, RecenteredWriter)}
    assert projected == {
        f"model.layers.{i}.{m}" for i in range(2) for m in ("self_attn.o_proj", "mlp.down_proj")
    }
    before = {name: tensor.clone() for name, tensor in recentered.state_dict().items()}
    with torch.no_grad():
        for parameter in recentered.parameters():
            parameter.add_(1.0)
    project_weights(recentered)

    def expected(name: str) -> Tensor:
        return before[name] if name.endswith(WRITERS) else before[name] + 1.0

    for name, tensor in recentered.state_dict().items():
        torch.testing.assert_close(tensor, expected(name), rtol=0, atol=1e-14, msg=name)
