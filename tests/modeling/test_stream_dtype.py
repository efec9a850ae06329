"""The dtype of the residual stream is what `residual_dtype` says, in every layer and for every norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from llmnorm.modeling import LlmNormForCausalLM

ModelMaker = Callable[..., LlmNormForCausalLM]
# The norms of a sublayer's output have the dtype of that output, which autocast makes bf16.
OUTPUT_NORMS = ("post_self_attn_layernorm", "post_mlp_layernorm")
FP32, BF16 = torch.float32, torch.bfloat16

# (dtype of the parameters, bf16 autocast, residual_dtype) -> dtype of the stream
CASES: dict[str, tuple[torch.dtype, bool, str | None, torch.dtype]] = {
    "fp32": (FP32, False, None, FP32),
    "fp32 under autocast": (FP32, True, None, FP32),
    "fp32, stream bf16": (FP32, False, "bf16", BF16),
    "fp32 under autocast, stream bf16": (FP32, True, "bf16", BF16),
    "fp32 under autocast, stream fp32": (FP32, True, "fp32", FP32),
    "bf16": (BF16, False, None, BF16),
    "bf16, stream fp32": (BF16, False, "fp32", FP32),
}


@pytest.mark.parametrize("case", CASES)
def test_stream_dtype(make_model: ModelMaker, tokens: Tensor, row: dict[str, Any], case: str) -> None:
    parameters, autocast, residual_dtype, expected = CASES[case]
    model = make_model(**row, residual_dtype=residual_dtype).to(parameters).train()
    seen = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].dtype))
        layer.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
        for name, norm in layer.named_children():
            if "norm" in name and name not in OUTPUT_NORMS:
                norm.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with torch.autocast("cpu", dtype=BF16, enabled=autocast):
        loss = model(tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    names = [name for layer in model.model.layers for name, _ in layer.named_children()]
    norms = sum("norm" in name and name not in OUTPUT_NORMS for name in names)
    assert len(seen) == 2 * 3 + norms
    assert set(seen) == {expected}
    assert {parameter.grad.dtype for parameter in model.parameters()} == {parameters}

    reference = make_model(**row).train()
    exact = reference(tokens, labels=tokens).loss
    # Three layers of bf16, 8 bits: losses of about 4 agree to a few per cent, fp32 ones to their last bits.
    low_precision = BF16 in (parameters, expected) or autocast
    torch.testing.assert_close(loss, exact, rtol=0.05 if low_precision else 1e-6, atol=0)


def test_generate_with_an_explicit_stream(make_model: ModelMaker, tokens: Tensor) -> None:
    for parameters, residual_dtype in ((FP32, "bf16"), (BF16, "fp32")):
        model = make_model(norm="mix_ln", residual_dtype=residual_dtype).to(parameters)
        options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        assert model.generate(tokens, attention_mask=torch.ones_like(tokens), **options).shape[1] > 12


def test_fp32_gains_in_a_bf16_model_do_not_widen_the_stream(make_model: ModelMaker, tokens: Tensor) -> None:
    """Llama's norm returns fp32 there, and a Post-LN stream would silently double."""
    model = make_model(norm="post_rmsnorm").to(BF16)
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.float()
    assert model.model(tokens).last_hidden_state.dtype == BF16
