"""O4: what may be claimed of training Pre-CRMSNorm: Pre-LN's trajectory, if norms have no gains to learn and
moments have the full width; with moments of the parameters' own width it is another one."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from llmnorm.modeling import LlmNormConfig, LlmNormForCausalLM, initialize_weights
from llmnorm.modeling.zero_mean import compress_reader, compress_writer, recenter

STEPS, LR, DECAY = 25, 1e-2, 0.1
READERS = (
    "q_proj.weight",
    "k_proj.weight",
    "v_proj.weight",
    "gate_proj.weight",
    "up_proj.weight",
    "lm_head.weight",
)


def build(norm: str) -> LlmNormForCausalLM:
    """In fp64, gains and shifts frozen at 1 and 0; 3 query heads over one key-value head."""
    config = LlmNormConfig(
        vocab_size=41,
        hidden_size=18,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        norm=norm,
    )
    model = LlmNormForCausalLM(config)
    initialize_weights(model, seed=0)
    for name, parameter in model.double().named_parameters():
        parameter.requires_grad_("norm" not in name)
    return model


def compress(name: str, full: Tensor) -> Tensor:
    if name.endswith(READERS):
        return compress_reader(full)
    return compress_writer(full, 1 if "embed" in name else 0)


def lift(name: str, gradient: Tensor) -> Tensor:
    """The gradient at full width that goes with the compressed one: the transpose of `compress`."""
    if name.endswith(READERS):
        return torch.cat((gradient, -gradient.sum(1, keepdim=True)), 1)
    dim = 1 if "embed" in name else 0
    return recenter(F.pad(gradient, (0, 1) if dim else (0, 0, 0, 1)), dim)


def losses(model: LlmNormForCausalLM, step: object) -> list[float]:
    """The loss before each update; `step` makes it."""
    history = []
    for number in range(STEPS):
        ids = torch.randint(0, 41, (4, 17), generator=torch.Generator().manual_seed(number % 3))
        logits = model(ids[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        model.zero_grad()
        loss.backward()
        step()  # type: ignore[operator]
        history.append(loss.item())
    return history


def adamw(parameters: list[Tensor], decay: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=LR, weight_decay=decay)


def trained(model: LlmNormForCausalLM) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def test_o4_gain_free_pre_crmsnorm_follows_pre_ln_with_moments_of_full_width() -> None:
    pre_ln, crms, own = build("pre_ln"), build("pre_crmsnorm"), build("pre_crmsnorm")
    for model in (crms, own):
        with torch.no_grad():
            for name, parameter in trained(model).items():
                parameter.copy_(compress(name, trained(pre_ln)[name]))
    # One step of AdamW from 0 without decay is minus lr times its update.
    updates = {name: torch.zeros_like(p, requires_grad=True) for name, p in trained(pre_ln).items()}
    moments = adamw(list(updates.values()), 0.0)

    @torch.no_grad()
    def lifted_step() -> None:
        for name, parameter in trained(crms).items():
            assert parameter.grad is not None
            updates[name].zero_()
            updates[name].grad = lift(name, parameter.grad)
        moments.step()
        for name, parameter in trained(crms).items():
            parameter.mul_(1 - LR * DECAY).add_(compress(name, updates[name]))

    expected = losses(pre_ln, adamw(list(trained(pre_ln).values()), DECAY).step)
    assert expected[-1] < expected[0] - 0.5
    lifted = losses(crms, lifted_step)
    # The bound for 25 updates in fp64.
    assert max(abs(a - b) for a, b in zip(expected, lifted, strict=True)) < 1e-12
    narrow = losses(own, adamw(list(trained(own).values()), DECAY).step)
    assert narrow[0] == lifted[0] and max(abs(a - b) for a, b in zip(expected, narrow, strict=True)) > 1e-2
