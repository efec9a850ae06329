"""The model through the fused kernels computes what it computes in torch: loss and every gradient.

The kernels run in Triton's interpreter, in a process of their own (the reason stands in
tests/kernels/conftest.py).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llmnorm.errors import UserError
from llmnorm.modeling import LlmNormConfig, LlmNormForCausalLM
from llmnorm.training.build import choose_kernels
from llmnorm_kernels import current_backend, use_backend

ROOT = Path(__file__).resolve().parent.parent.parent

# Grouped heads, an odd number of tokens, a label that is not scored. 3e-5 of the largest gradient: both sides
# sum in fp32, in different orders.
COMPARISON = """
import sys
sys.path.insert(0, "tests/kernels")
import interpreter_shim, torch
interpreter_shim.install()
from llmnorm.modeling import LlmNormConfig, LlmNormForCausalLM, initialize_weights
from llmnorm.modeling import fused, mlp, norms, rotary
from llmnorm_kernels import use_backend

called = []
class Recorder:
    def __getattr__(self, name):
        called.append(name)
        return getattr(fused_kernels, name)
fused_kernels = fused.kernels
for module in (fused, norms, mlp, rotary):
    module.kernels = Recorder()

for argument in sys.argv[1:]:
    norm, _, names = argument.partition(":")
    expected = set(names.split(","))
    config = LlmNormConfig(
        vocab_size=37, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, norm=norm, attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    tokens = torch.randint(0, 37, (2, 9))
    labels = tokens.roll(-1, 1)
    labels[:, -1] = -100
    results = {}
    for backend in ("torch", "triton"):
        model = LlmNormForCausalLM(config).train()
        initialize_weights(model, 1)
        called.clear()
        with use_backend(backend):
            out = model(tokens, shift_labels=labels, labels=labels, num_items_in_batch=torch.tensor(12.0),
                        use_cache=False, return_logits=False)
            assert out.logits is None
            out.loss.backward()
        used = set(called) - {"runs_triton"}
        results[backend] = out.loss.detach(), {n: p.grad for n, p in model.named_parameters()}, used
    loss, gradients, used = results["torch"]
    fused_loss, fused_gradients, fused_used = results["triton"]
    assert not used and fused_used == expected, (used, fused_used)
    torch.testing.assert_close(fused_loss, loss, rtol=1e-6, atol=0)
    for name, gradient in gradients.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(fused_gradients[name], gradient, rtol=0, atol=3e-5 * scale, msg=name)
    print(norm, "equal")
"""


POINTWISE = "swiglu,linear_cross_entropy"
CASES = [
    f"layernorm_scaling:rms_norm,apply_rope,{POINTWISE}",
    f"mix_ln:rms_norm,apply_rope,{POINTWISE}",
    f"post_ln:layer_norm,apply_rope,{POINTWISE}",
    f"pre_crmsnorm:crms_norm,apply_rope,{POINTWISE}",
    f"qk_norm:rms_norm,qk_norm_rope,{POINTWISE}",
]


def test_loss_and_gradients_are_those_of_torch() -> None:
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-c", COMPARISON, *CASES],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("equal") == len(CASES)


# bf16 rounds features, scores and states of the kernel once each, where torch sums in fp32: the loss moves by
# parts in a thousand, gradients by a few percent of the largest.
LINEAR = """
import sys
sys.path.insert(0, "tests/kernels")
import interpreter_shim, torch
interpreter_shim.install()
from llmnorm.modeling import LlmNormConfig, LlmNormForCausalLM, initialize_weights, linear_attention
from llmnorm_kernels import use_backend

SEEN = ("segments", "feature_map", "exponent")
calls = []
kernel = linear_attention.kernels.linear_attention
class Recorder:
    def linear_attention(self, *args, **options):
        calls.append({name for name in SEEN if options.get(name) is not None})
        return kernel(*args, **options)
linear_attention.kernels = Recorder()

CASES = {
    "sla": ({"floor": 0.1}, {"segments", "feature_map"}),
    "nalaformer": ({"floor": 0.1}, {"segments", "feature_map", "exponent"}),
    "nalaformer cosine": ({"floor": 0.1, "feature_map": "cosine"}, {"segments"}),
}
for case, (options, expected) in CASES.items():
    name = case.partition(" ")[0]
    config = LlmNormConfig(
        vocab_size=37, hidden_size=32, intermediate_size=40, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, attention=name, attention_options=options,
    )
    torch.manual_seed(0)
    tokens = torch.randint(0, 37, (2, 40))
    positions = torch.cat((torch.arange(13), torch.arange(27))).repeat(2, 1)
    results = []
    for backend in ("torch", "triton"):
        model = LlmNormForCausalLM(config).train()
        initialize_weights(model, 1)
        calls.clear()
        with use_backend(backend), torch.autocast("cpu", torch.bfloat16):
            loss = model(tokens, labels=tokens, position_ids=positions, use_cache=False).loss
        loss.backward()
        results.append((loss.detach(), {n: p.grad for n, p in model.named_parameters()}))
    assert calls == [expected], (case, calls)
    (loss, gradients), (fused_loss, fused_gradients) = results
    torch.testing.assert_close(fused_loss, loss, rtol=2e-3, atol=0)
    for name, gradient in gradients.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(fused_gradients[name], gradient, rtol=0, atol=4e-2 * scale, msg=name)
    print(case, "equal")
"""


def test_linear_attention_of_packed_documents_is_that_of_torch() -> None:
    """Under bf16 autocast, map and documents inside the kernel; a map that it lacks comes before it."""
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-c", LINEAR],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("equal") == 3


def test_the_loss_alone_is_the_loss_beside_logits() -> None:
    config = LlmNormConfig(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlmNormForCausalLM(config).train()
    tokens = torch.randint(0, 31, (2, 5))
    both, alone = model(tokens, labels=tokens), model(tokens, labels=tokens, return_logits=False)
    assert alone.logits is None and both.logits.shape == (2, 5, 31)
    assert torch.equal(alone.loss, both.loss)
    with pytest.raises(ValueError, match="return_logits=False leaves nothing to return without labels"):
        model(tokens, return_logits=False)


def test_kernels_that_cannot_run_are_refused() -> None:
    with pytest.raises(UserError, match=r"kernels=triton needs a GPU.*set kernels to auto"):
        choose_kernels("triton", torch.device("cpu"))
    before = current_backend()
    try:
        line = choose_kernels("torch", torch.device("cpu"))
        assert current_backend() == "torch"
        assert "rms_norm" in line and "kernels: torch" in line
    finally:
        use_backend(before)
