"""Bad input to every public operator: ValueError that names the argument, before anything is launched.

Each operator is called once with good tensors, then with one of them spoiled at a time.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from operator_calls import CALLS, arguments, call, rand

import llmnorm_kernels as kernels
from llmnorm_kernels import dispatch

# Operators of lists, of a counter alone, or tested for the same beside their own tests.
ELSEWHERE = {"adamw_many_", "round_into_"}
# Nothing to quantize is a result and a step of an empty tensor none, not an error.
PLAIN_ZERO = {"fake_quantize", "adamw_"}


def spoiled(name: str, spoil: Callable[[torch.Tensor], torch.Tensor], start: int) -> list[tuple[str, Any]]:
    """Every set of arguments with one tensor spoiled, from the `start`-th on."""
    return [
        (key, {**arguments(name), key: spoil(arguments(name)[key])}) for key in list(arguments(name))[start:]
    ]


def test_every_operator_is_in_the_table():
    public = {name for name in dispatch._operators if name in kernels.__all__}
    assert public == set(CALLS) | (ELSEWHERE & public)


@pytest.mark.parametrize("name", CALLS)
def test_good_input_is_taken(name):
    call(name, arguments(name))


@pytest.mark.parametrize("name", CALLS)
def test_tensors_on_two_devices(name):
    for key, tensors in spoiled(name, lambda t: t.to("meta"), 1):
        with pytest.raises(ValueError) as error:
            call(name, tensors)
        assert key in str(error.value) or "scales" in str(error.value), (key, str(error.value))


@pytest.mark.parametrize("name", CALLS)
def test_dtypes_that_no_kernel_takes(name):
    for key, tensors in spoiled(
        name, lambda t: t.to(torch.int32 if t.is_floating_point() else torch.float32), 0
    ):
        with pytest.raises(ValueError, match=key):
            call(name, tensors)


@pytest.mark.parametrize("name", CALLS)
def test_shapes_that_do_not_fit(name):
    for key, tensors in spoiled(name, lambda t: t.repeat(*[2] * t.dim()), 1):
        with pytest.raises(ValueError, match=key):
            call(name, tensors)


@pytest.mark.parametrize(
    "name", [name for name in CALLS if "eps" in inspect.signature(getattr(kernels, name)).parameters]
)
@pytest.mark.parametrize("eps", [-1e-6, float("nan")])
def test_eps_below_zero(name, eps):
    with pytest.raises(ValueError, match="eps="):
        call(name, arguments(name), eps=eps)


@pytest.mark.parametrize("name", [name for name in CALLS if name not in PLAIN_ZERO])
def test_a_hidden_size_of_zero(name):
    tensors = {key: t[..., :0] if t.is_floating_point() else t for key, t in arguments(name).items()}
    with pytest.raises(ValueError):
        call(name, tensors)


def test_lists_of_tensors():
    one, two = [rand(4)], [rand(4), rand(4)]
    good = {"step": 1, "lr": 0.1}
    with pytest.raises(ValueError, match="grads has 2 tensors but params has 1"):
        kernels.adamw_many_(one, two, one, one, **good)
    with pytest.raises(ValueError, match="exp_avgs and exp_avg_sqs have dtypes"):
        kernels.adamw_many_(one, one, one, [one[0].bfloat16()], **good)
    for key, value in (("step", 0), ("lr", -1.0), ("eps", -1.0), ("betas", (1.0, 0.9))):
        with pytest.raises(ValueError, match=f"{key}="):
            kernels.adamw_many_(one, one, one, one, **(good | {key: value}))
    meta = [x.to("meta") for x in two[:1]]
    with pytest.raises(ValueError, match="params are on cpu and meta"):
        kernels.adamw_many_(*([one[0], meta[0]] for _ in range(4)), **good)


@pytest.mark.parametrize("name", CALLS)
def test_what_is_no_tensor(name):
    """None where a tensor is needed, a list or a number anywhere."""
    parameters = inspect.signature(getattr(kernels, name)).parameters
    optional = {key for key, value in parameters.items() if value.default is None}
    optional |= {"q_weight", "k_weight"}  # None: a norm without a gain
    for key in arguments(name):
        for wrong in (None, [1.0, 2.0], 1.0):
            if wrong is None and key in optional:
                continue
            with pytest.raises(ValueError, match=f"{key} must be a torch.Tensor, not"):
                call(name, {**arguments(name), key: wrong})


@pytest.mark.parametrize("name", CALLS)
def test_numbers_that_are_none(name):
    """Of every operator's numeric options: NaN, infinity and text."""
    parameters = inspect.signature(getattr(kernels, name)).parameters
    for key in {"eps", "lr", "weight_decay", "scale", "residual_scale", "z_loss", "floor", "alpha", "beta"}:
        if key not in parameters:
            continue
        for wrong in (float("nan"), float("inf"), "0.1"):
            with pytest.raises(ValueError, match=f"{key}={wrong!r} must be"):
                call(name, arguments(name), **{key: wrong})


def test_moments_and_factors_of_a_step():
    given = arguments("adamw_")
    for state in ("exp_avg", "exp_avg_sq"):
        with pytest.raises(ValueError, match=f"{state} has dtype torch.float8_e4m3fn; it takes float32"):
            call("adamw_", {**given, state: given[state].to(torch.float8_e4m3fn)})
    for wrong in (torch.ones(2), torch.ones(1, dtype=torch.float64), torch.ones(1, device="meta")):
        with pytest.raises(ValueError, match=r"grad_scale is .* it must be one float32 number on cpu"):
            call("adamw_", given, grad_scale=wrong)
    with pytest.raises(ValueError, match=r"betas=\(0.9,\) must be two numbers"):
        call("adamw_", given, betas=(0.9,))
