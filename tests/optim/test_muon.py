"""Muon: torch.optim.Muon step for step, and the oracles of its card."""

from __future__ import annotations

import math

import pytest
import torch
from matrix_cases import HIDDEN, gradients, make_parameters, run

from llmnorm.errors import UserError
from llmnorm.optim import create_optimizer
from llmnorm.optim.muon import Muon
from llmnorm.optim.newton_schulz import orthogonalize
from llmnorm.optim.update_size import LR_MODES

SHAPES = [(12, 12), (24, 12), (12, 24)]


def matrices(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in SHAPES]


def step_both(ours, theirs, optimizers, steps: int = 6) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for mine, its in zip(ours, theirs, strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator).to(mine.dtype)
            its.grad = mine.grad.clone()
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.1},
        {"momentum": 0.9, "ns_steps": 6},
        {"nesterov": False},
        {"ns_coefficients": (2.0, -1.5, 0.5)},
        {"adjust_lr_fn": "original"},
        {"adjust_lr_fn": "match_rms_adamw", "weight_decay": 0.1},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_torch_muon_step_for_step(options, dtype):
    if dtype is torch.bfloat16 and not options.get("nesterov", True):
        pytest.skip("torch normalizes the momentum in place there; see the next test")
    ours, theirs = matrices(dtype), matrices(dtype)
    modes = {None: "paper", "original": "keller", "match_rms_adamw": "adam_rms"}
    plain = {key: value for key, value in options.items() if key != "adjust_lr_fn"}
    mode = modes[options.get("adjust_lr_fn")]
    reference = torch.optim.Muon(theirs, **{"lr": 0.02, "weight_decay": 0.0, **options})
    step_both(ours, theirs, [Muon(ours, lr=0.02, lr_mode=mode, **plain), reference])
    for mine, its in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, its, rtol=0, atol=0 if mode == "paper" else 1e-7)
        torch.testing.assert_close(mine, its, rtol=1e-6, atol=1e-7)


def test_momentum_of_bf16_weights_is_not_corrupted_without_nesterov():
    """torch.optim.Muon divides the bf16 buffer itself by its norm; here it stays the average of gradients."""
    (weight,) = matrices(torch.bfloat16)[:1]
    optimizer = Muon([weight], lr=0.0, nesterov=False)
    generator = torch.Generator().manual_seed(1)
    average = torch.zeros(weight.shape, dtype=torch.float64)
    for _ in range(20):
        weight.grad = torch.randn(weight.shape, generator=generator).bfloat16()
        average.lerp_(weight.grad.double(), 0.05)
        optimizer.step()
    # One bf16 rounding (2^-9) of a value of about 0.3 per step, averaged over 20 steps.
    kept = optimizer.state[weight]["momentum_buffer"].double()
    torch.testing.assert_close(kept, average, rtol=0, atol=5e-3)


def test_average_and_sum_form_of_the_momentum_give_one_trajectory():
    weight = matrices(torch.float64)[1]
    expected = weight.detach().clone()
    optimizer = Muon([weight], lr=0.1, ns_dtype="fp32")
    total = torch.zeros_like(expected)
    generator = torch.Generator().manual_seed(1)
    for _ in range(8):
        weight.grad = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        optimizer.step()
        total = 0.95 * total + weight.grad
        direction = weight.grad + 0.95 * total
        expected -= 0.1 * math.sqrt(2) * orthogonalize(direction, (3.4445, -4.7750, 2.0315)).double()
    torch.testing.assert_close(weight.detach(), expected, rtol=0, atol=1e-5)


def test_rms_of_the_update_in_every_mode():
    for shape in SHAPES:
        m, n = shape
        targets = {
            "paper": 1 / math.sqrt(n),
            "keller": 1 / math.sqrt(n),
            "adam_rms": 0.2,
            "rms_to_rms": math.sqrt(m / n) / math.sqrt(max(m, n)),
        }
        for mode, target in targets.items():
            weight = torch.zeros(shape, requires_grad=True)
            # Enough iterations for all singular values to be 1.
            options = {"ns_coefficients": "polar_express", "ns_steps": 12, "ns_dtype": "fp32"}
            optimizer = Muon([weight], lr=0.5, lr_mode=mode, **options)
            weight.grad = torch.randn(shape, generator=torch.Generator().manual_seed(3))
            optimizer.step()
            assert weight.detach().square().mean().sqrt().item() == pytest.approx(0.5 * target, rel=1e-3)


def test_row_blocks_equal_separate_parameters():
    blocks = {"q_proj": 4, "up_proj": [12, 8, 4]}
    options = {"lr": 0.1, "ns_dtype": "fp32"}
    whole = {name: make_parameters()[name] for name in HIDDEN[:2]}
    heights = {HIDDEN[0]: [4, 4, 4], HIDDEN[1]: [12, 8, 4]}
    parts = {
        f"{name}.{index}": part.detach().clone().requires_grad_()
        for name, parameter in whole.items()
        for index, part in enumerate(parameter.split(heights[name]))
    }
    whole_optimizer = Muon(list(whole.items()), row_blocks=blocks, **options)
    part_optimizer = Muon(list(parts.items()), **options)
    for grads in gradients(3):
        for name, parameter in whole.items():
            parameter.grad = grads[name]
            for index, part in enumerate(grads[name].split(heights[name])):
                parts[f"{name}.{index}"].grad = part.clone()
        whole_optimizer.step()
        part_optimizer.step()
    for name, parameter in whole.items():
        pieces = torch.cat([parts[f"{name}.{index}"] for index in range(len(heights[name]))])
        torch.testing.assert_close(parameter, pieces, rtol=0, atol=1e-6)


def test_row_blocks_leave_the_bias_of_a_projection_alone_and_show_in_the_table(llama):
    model = llama()  # hidden 16, two heads of 8, biases in the attention
    optimizer = create_optimizer("muon", model, lr=1.0, row_blocks={"gate_proj": 8, "q_proj": [12, 4]})
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    group = optimizer.param_groups[0]
    q_proj = model.model.layers[0].self_attn.q_proj.weight
    for mode in LR_MODES:
        # 12 and 4 rows of 16 columns: both are wide, so every mode but rms_to_rms gives both one RMS.
        predicted = optimizer.update_rms({**group, "lr_mode": mode}, q_proj, "layers.0.q_proj.weight")
        blocks = {
            "paper": 1 / 16,
            "keller": 1 / 16,
            "adam_rms": 0.04,
            "rms_to_rms": (12 * 12 + 4 * 4) / 16**3,
        }
        assert predicted == pytest.approx(math.sqrt(blocks[mode])), mode


@pytest.mark.parametrize("blocks", [{"q_prj": 8}, {"q_proj": 0}, {"q_proj": [8]}, {"embed_tokens": 8}])
def test_row_blocks_that_fit_nothing_are_refused(llama, blocks):
    with pytest.raises(UserError, match=rf"optimizer\.row_blocks\.{next(iter(blocks))}"):
        create_optimizer("muon", llama(), lr=1.0, row_blocks=blocks)


def test_gram_engine_gives_the_same_trajectory():
    standard, gram = make_parameters(), make_parameters()
    named = [[(name, parameters[name]) for name in HIDDEN] for parameters in (standard, gram)]
    run(Muon(named[0], lr=0.1, ns_dtype="fp32"), standard, 3)
    run(Muon(named[1], lr=0.1, ns_dtype="fp32", ns_method="gram"), gram, 3)
    for name in HIDDEN:
        torch.testing.assert_close(standard[name], gram[name], rtol=0, atol=1e-4)
