"""The norm kernels against the float64 reference: kinds, fusions, dtypes, widths, layouts, and life inside
autograd."""

from __future__ import annotations

import functools

import pytest
import torch
from comparing import assert_matches_reference, outputs_and_gradients, relative_error
from torch.utils.checkpoint import checkpoint

import llmnorm_kernels as kernels
from llmnorm_kernels import use_backend

OPS = torch.ops.llmnorm_kernels

# name -> function of (x, residual, weight, bias); each uses a subset, so every fusion is one row.
FUSIONS = {
    "rms": lambda x, r, w, b: kernels.rms_norm(x, w),
    "rms_zero_centered_scaled": lambda x, r, w, b: kernels.rms_norm(
        x, w, scale=0.5, zero_centered=True, cast="float32"
    ),
    "rms_no_gain": lambda x, r, w, b: kernels.rms_norm(x, eps=1e-3),
    "layer": lambda x, r, w, b: kernels.layer_norm(x, w, b, scale=0.25),
    "crms": lambda x, r, w, b: kernels.crms_norm(x, w),
    "add_rms": lambda x, r, w, b: kernels.add_rms_norm(x, r, w),
    "add_layer_scaled": lambda x, r, w, b: kernels.add_layer_norm(x, r, w, b, residual_scale=1.5),
    "post_rms": lambda x, r, w, b: kernels.norm_add(x, r, w, cast="float32"),
    "post_layer": lambda x, r, w, b: kernels.norm_add(x, r, w, b, kind="layernorm", residual_scale=2.0),
    "post_crms": lambda x, r, w, b: kernels.norm_add(x, r, w, kind="crmsnorm"),
    "sandwich_rms": lambda x, r, w, b: kernels.sandwich_add(x, r, w),
    "sandwich_layer": lambda x, r, w, b: kernels.sandwich_add(
        x, r, w, b, kind="layernorm", residual_scale=0.5
    ),
}


def operands(rows, width, dtype, device, gain_dtype=None):
    x, residual = (torch.randn(*rows, width, device=device).to(dtype) for _ in range(2))
    weight, bias = (torch.randn(width, device=device).to(gain_dtype or dtype) for _ in range(2))
    return x, residual, weight, bias


def check(fusion, x, residual, weight, bias, **tolerances):
    function = FUSIONS[fusion]
    used = {
        "residual": fusion.startswith(("add", "post", "sandwich")),
        "weight": fusion != "rms_no_gain",
        "bias": "layer" in fusion,
    }

    def call(*given):
        slots = dict(zip([name for name, there in {"x": True, **used}.items() if there], given, strict=True))
        return function(slots["x"], slots.get("residual"), slots.get("weight"), slots.get("bias"))

    chosen = [
        t for t, there in zip((x, residual, weight, bias), (True, *used.values()), strict=True) if there
    ]
    assert_matches_reference(call, *chosen, **tolerances)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fusion", FUSIONS)
def test_fusions(device, fusion, dtype):
    check(fusion, *operands((2, 9), 127, dtype, device))


@pytest.mark.parametrize("fusion", ["layer", "add_rms", "crms"])
@pytest.mark.parametrize("width", [5, 16, 64, 100, 1023, 4097])
def test_widths(device, fusion, width):
    check(fusion, *operands((3,), width, torch.float32, device))


@pytest.mark.parametrize(
    "fusion", [pytest.param(f, marks=() if f in ("layer", "add_rms") else pytest.mark.slow) for f in FUSIONS]
)
def test_split_rows(device, fusion):
    # 16,385 columns exceed every single-tile entry of both tables.
    check(fusion, *operands((2,), 16385, torch.float32, device))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [(1,), (33,), (2, 3, 5)], ids=str)
@pytest.mark.parametrize("width", [16, 63, 128, 1000, 2048, 4096, 8192])
@pytest.mark.parametrize("fusion", ["rms", "layer", "crms", "add_rms", "post_layer", "sandwich_rms"])
def test_grid(device, fusion, width, rows, dtype):
    check(fusion, *operands(rows, width, dtype, device))


@pytest.mark.slow
@pytest.mark.parametrize("fusion", ["rms", "add_layer_scaled", "crms"])
@pytest.mark.parametrize("width", [32768, 65535, 65536])
def test_widest(device, fusion, width):
    check(fusion, *operands((3,), width, torch.bfloat16, device))


@pytest.mark.parametrize("fusion", ["rms", "add_rms", "post_layer", "sandwich_rms"])
def test_mixed_dtypes(device, fusion):
    """A bfloat16 branch meets a float32 stream and float32 gains, as under autocast; each gradient has its
    input's dtype."""
    x, residual, weight, bias = operands((4,), 96, torch.bfloat16, device, gain_dtype=torch.float32)
    check(fusion, x, residual.float(), weight, bias, tolerance=6e-3)


def test_output_dtype_follows_the_cast_order(device):
    x, weight = torch.randn(2, 64, device=device, dtype=torch.bfloat16), torch.ones(64, device=device)
    assert kernels.rms_norm(x, weight).dtype == torch.float32
    assert kernels.rms_norm(x, weight, cast="float32").dtype == torch.bfloat16
    assert kernels.rms_norm(x, weight, out_dtype=torch.float16).dtype == torch.float16


@pytest.mark.parametrize("cast", ["llama", "float32"])
def test_cast_order_is_exact(device, cast):
    """In bfloat16 the kernel rounds where the reference rounds: all but the ties of a different rsqrt are
    equal."""
    x, _, weight, _ = operands((16,), 256, torch.bfloat16, device)
    fused = kernels.rms_norm(x, weight, cast=cast)
    with use_backend("torch"):
        reference = kernels.rms_norm(x, weight, cast=cast)
        other = kernels.rms_norm(x, weight, cast="float32" if cast == "llama" else "llama")
    assert (fused != reference).float().mean() < 2e-3
    assert (fused != other).float().mean() > 0.05


@pytest.mark.parametrize("layout", ["transposed", "sliced_rows", "padded", "shifted", "expanded"])
@pytest.mark.parametrize("fusion", ["crms", "add_rms", "layer"])
def test_layouts(device, fusion, layout):
    x, residual, weight, bias = operands((6,), 95, torch.bfloat16, device)
    if layout == "transposed":
        x = torch.randn(95, 6, device=device, dtype=x.dtype).t()
    elif layout == "sliced_rows":
        x = torch.randn(12, 130, device=device, dtype=x.dtype)[::2, 7:102]
    elif layout == "padded":
        padded, stream = (kernels.empty_padded(6, 95, dtype=x.dtype, device=device) for _ in range(2))
        # What stands in the padding must not matter.
        torch.as_strided(padded, (6, 96), (96, 1)).fill_(float("nan"))
        torch.as_strided(stream, (6, 96), (96, 1)).fill_(float("nan"))
        x, residual = padded.copy_(x), stream.copy_(residual)
    elif layout == "shifted":
        x = torch.randn(6 * 95 + 1, device=device, dtype=x.dtype)[1:].view(6, 95)
    else:
        x = torch.randn(1, 95, device=device, dtype=x.dtype).expand(6, 95)
    check(fusion, x, residual, weight, bias)


def test_padding_stays_zero_and_is_kept(device):
    x = kernels.empty_padded(4, 63, device=device).normal_()
    y = kernels.rms_norm(x)
    assert y.stride() == (64, 1)
    assert torch.as_strided(y, (4, 64), (64, 1))[:, 63].eq(0).all()


def test_expanded_upstream_gradient(device):
    x, _, weight, _ = operands((5,), 40, torch.float32, device)
    x.requires_grad_()
    kernels.rms_norm(x, weight).sum().backward()
    expected = x.detach().clone().requires_grad_()
    with use_backend("torch"):
        kernels.rms_norm(expected, weight).sum().backward()
    assert relative_error(x.grad, expected.grad) < 1e-6


@pytest.mark.parametrize("fusion", ["rms", "add_layer_scaled", "sandwich_rms"])
def test_no_rows(device, fusion):
    check(fusion, *operands((0, 3), 32, torch.float32, device))


def test_zero_huge_and_constant_rows(device):
    rows = torch.zeros(5, 64, device=device)
    rows[1], rows[2], rows[3, 7] = 1e18, 3.0, float("inf")
    rows[4] = torch.randn(64)
    x = rows.to(torch.bfloat16).requires_grad_()
    y = kernels.rms_norm(x)
    assert y[0].eq(0).all() and y[1].eq(1).all()
    assert kernels.layer_norm(x)[2].eq(0).all()
    # A non-finite number spoils its own row only.
    assert y[4].isfinite().all() and not y[3].isfinite().all()
    y[[0, 1, 2, 4]].float().sum().backward()
    assert x.grad[[0, 1, 2, 4]].isfinite().all()


def test_rows_beyond_32_bit_offsets(device):
    """Rows 2^30 elements apart: a 32-bit offset of row 2 would wrap (the interpreter's overflow check would
    fire first)."""
    x = torch.empty_strided((3, 64), (2**30, 1), dtype=torch.bfloat16, device=device)
    x.copy_(torch.randn(3, 64))
    weight = torch.ones(64, device=device, dtype=torch.bfloat16)
    with use_backend("torch"):
        expected = kernels.rms_norm(x.contiguous(), weight)
    assert relative_error(kernels.rms_norm(x, weight), expected) < 1e-3


@pytest.mark.parametrize("fusion", ["add_layer_scaled", "crms"])
def test_gradcheck_of_the_kernel(device, fusion):
    x, residual, weight, bias = (t.requires_grad_() for t in operands((3,), 5, torch.float64, device))
    function = functools.partial(FUSIONS[fusion])
    # Some fusions leave operands out; gradcheck wants those that are used.
    probe = torch.autograd.grad(
        sum(o.sum() for o in _tuple(function(x, residual, weight, bias))),
        [x, residual, weight, bias],
        allow_unused=True,
    )
    names = [i for i, gradient in enumerate(probe) if gradient is not None]

    def of_used(*used):
        full = [x.detach(), residual.detach(), weight.detach(), bias.detach()]
        for position, tensor in zip(names, used, strict=True):
            full[position] = tensor
        return function(*full)

    assert torch.autograd.gradcheck(of_used, [(x, residual, weight, bias)[i] for i in names])


def _tuple(value):
    return value if isinstance(value, tuple) else (value,)


def test_only_one_output_used(device):
    """Backward with a gradient for y only, and for s only, equals the reference's."""
    x, residual, weight, _ = operands((4,), 48, torch.float32, device)
    for pick in (0, 1):
        # s does not depend on the gain, so the gain is held constant.
        assert_matches_reference(
            lambda a, b, pick=pick: kernels.add_rms_norm(a, b, weight.to(a.dtype))[pick], x, residual
        )


@pytest.mark.parametrize(
    "layout",
    ["added", *(pytest.param(name, marks=pytest.mark.slow) for name in ("strided", "empty", "padded"))],
)
def test_opcheck(device, layout):
    x, residual, weight, bias = operands((6,), 39, torch.float32, device)
    if layout == "strided":
        x, residual, bias = x[::2], None, None
    elif layout == "empty":
        x, residual = x[:0], residual[:0]
    elif layout == "padded":
        x, residual, weight, bias = kernels.empty_padded(6, 39, device=device).normal_(), None, None, None
    kind, scales = "layernorm", (0.5, 2.0, False, True)
    forward = (x, residual, weight, bias, kind, False, 1e-6, *scales, torch.float32)
    torch.library.opcheck(OPS.norm_forward.default, forward)
    y, s, shift, rstd = OPS.norm_forward(*forward)
    ds, stream, split = (None, x, None) if residual is None else (s, s, torch.bfloat16)
    backward = (y, ds, stream, weight, bias, shift, rstd, kind, *scales, torch.float32, split)
    torch.library.opcheck(OPS.norm_backward.default, backward)


@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_compiles_to_one_graph(device, dynamic):

    def block(x, residual, weight, bias):
        y, s = kernels.add_rms_norm(x, residual, weight)
        return kernels.sandwich_add(kernels.layer_norm(y, weight, bias), s, weight)

    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (5, 8):
        given = operands((rows,), 40, torch.bfloat16, device)
        eager = outputs_and_gradients(block, given)
        traced = outputs_and_gradients(compiled, given)
        for a, b in zip(eager[0] + eager[1], traced[0] + traced[1], strict=True):
            assert torch.equal(a, b)


def test_checkpoint_and_autocast(device):
    x, residual, weight, _ = operands((5,), 40, torch.float32, device)

    def block(x, residual, weight):
        y, s = kernels.add_rms_norm(
            torch.nn.functional.linear(x, torch.eye(40, device=device)), residual, weight
        )
        return y + s

    def recomputed(*given):
        return checkpoint(block, *given, use_reentrant=False)

    with torch.autocast(device, torch.bfloat16):
        plain, again = (
            outputs_and_gradients(block, (x, residual, weight)),
            outputs_and_gradients(recomputed, (x, residual, weight)),
        )
        assert kernels.rms_norm(x.bfloat16(), weight.bfloat16()).dtype == torch.bfloat16
    for a, b in zip(plain[0] + plain[1], again[0] + again[1], strict=True):
        assert torch.equal(a, b)


def test_gradients_do_not_depend_on_the_run(device):
    given = operands((33,), 64, torch.bfloat16, device)[:3]
    first, second = (outputs_and_gradients(kernels.add_rms_norm, given) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


def test_double_backward_is_refused(device):
    x = torch.randn(2, 64, device=device, requires_grad=True)
    (gradient,) = torch.autograd.grad(kernels.rms_norm(x).pow(3).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
