"""How a kernel's output and gradients are held against the reference in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from llmnorm_kernels import use_backend

# Relative L2 error of one operator against float64 on the same rounded inputs. float32: a few roundings of
# 6e-8. 16-bit outputs: the last rounding alone is 1.7e-3 (bfloat16) and 2.1e-4 (float16) in this measure;
# "llama" casts round twice more.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.detach(), expected.detach()
    difference = (actual.double().cpu() - expected.double().cpu()).norm()
    size = expected.double().cpu().norm()
    return float(difference / size) if size > 0 else float(difference)


def outputs_and_gradients(
    function: Callable[..., Any], tensors: Sequence[Tensor | None], upstream: Sequence[Tensor] | None = None
) -> tuple[list[Tensor], list[Tensor | None], list[Tensor]]:
    """Outputs of function(*tensors), gradients of <outputs, upstream> for every floating tensor, and the
    upstream used."""
    leaves = [t.detach().requires_grad_() if t is not None and t.is_floating_point() else t for t in tensors]
    outputs = function(*leaves)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    if upstream is None:
        generator = torch.Generator().manual_seed(1)
        upstream = [
            torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.device, o.dtype)
            for o in outputs
        ]
    wanted = [t for t in leaves if t is not None and t.requires_grad]
    gradients = torch.autograd.grad(
        outputs, wanted, [u.to(o.device, o.dtype) for u, o in zip(upstream, outputs, strict=True)]
    )
    return outputs, list(gradients), list(upstream)


def assert_matches_reference(
    function: Callable[..., Any],
    *tensors: Tensor | None,
    tolerance: float | None = None,
    gradient_tolerance: float | None = None,
) -> None:
    """The kernels' outputs and gradients equal those of the torch reference run in float64 from the same
    inputs."""
    floats = [t for t in tensors if t is not None and t.is_floating_point()]
    coarsest = max((t.dtype for t in floats), key=TOLERANCE.__getitem__)
    tolerance = tolerance or TOLERANCE[coarsest]
    outputs, gradients, upstream = outputs_and_gradients(function, tensors)
    exact = [t.double() if t is not None and t.is_floating_point() else t for t in tensors]
    with use_backend("torch"):
        expected, expected_gradients, _ = outputs_and_gradients(function, exact, upstream)
    for index, (actual, reference) in enumerate(zip(outputs, expected, strict=True)):
        assert actual.shape == reference.shape
        error = relative_error(actual, reference)
        assert error <= tolerance, f"output {index}: relative error {error:.2e} > {tolerance:.0e}"
    for index, (actual, reference, leaf) in enumerate(
        zip(gradients, expected_gradients, floats, strict=True)
    ):
        assert actual is not None and reference is not None
        assert actual.shape == leaf.shape and actual.dtype == leaf.dtype
        error = relative_error(actual, reference)
        limit = gradient_tolerance or tolerance
        assert error <= limit, f"gradient {index}: relative error {error:.2e} > {limit:.0e}"
