"""The line that says what computes attention, and SDPA's order on Hopper."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend

from llmnorm.modeling import LlmNormConfig
from llmnorm.training import attention_backends
from llmnorm.training.attention_backends import describe_attention, sdpa_backend, sdpa_order

CPU = torch.device("cpu")


def config(**options) -> LlmNormConfig:
    shape = {"vocab_size": 31, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2}
    return LlmNormConfig(**shape, num_attention_heads=4, num_key_value_heads=2, **options)


@pytest.mark.parametrize("masked", [False, True])
def test_the_backend_named_is_the_one_that_sdpa_runs(masked: bool) -> None:
    """Oracle: the operator in torch's own trace of the call."""
    named = sdpa_backend(config(), CPU, torch.float32, masked)
    q, k = torch.randn(1, 4, 8, 8), torch.randn(1, 4 if masked else 2, 8, 8)
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool) if masked else None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
        torch.nn.functional.scaled_dot_product_attention(
            q, k, k, attn_mask=mask, is_causal=not masked, enable_gqa=not masked
        )
    flash = any("flash_attention" in event.key for event in trace.key_averages())
    assert named == (SDPBackend.FLASH_ATTENTION if flash else SDPBackend.MATH)


def test_the_line_says_what_documents_cost() -> None:
    model = config(attn_implementation="sdpa")
    assert "mask" not in describe_attention(model, CPU, torch.float32, False)
    line = describe_attention(model, CPU, torch.float32, True)
    assert line.startswith("attention on cpu: softmax by SDPA's ") and "under a mask of documents" in line
    model._attn_implementation = "eager"
    assert describe_attention(model, CPU, torch.float32, True) == "attention on cpu: softmax by eager"
    sigmoid = config(attention_options={"normalizer": "sigmoid"}, attn_implementation="sdpa")
    assert "sigmoid in torch" in describe_attention(sigmoid, CPU, torch.float32, False)


@pytest.mark.parametrize(
    ("kind", "options", "dtype", "said"),
    [
        ("nalaformer", {}, torch.bfloat16, "nalaformer by the Triton kernel, map relu_split inside"),
        ("sla", {}, torch.bfloat16, "sla by the Triton kernel, map relu inside"),
        ("nalaformer", {"feature_map": "cosine"}, torch.bfloat16, "Triton kernel, its map cosine in torch"),
        ("nalaformer", {"rope": "after"}, torch.bfloat16, "in torch (no kernel for attention_options.rope:"),
        ("sla", {}, torch.float32, "sla in torch (the kernels take bf16 and fp16, not float32)"),
        ("nalaformer", {"head_dim": 256}, torch.bfloat16, "in torch (512 features a head"),
    ],
)  # fmt: skip
def test_the_line_says_which_linear_attention_runs_in_torch(kind, options, dtype, said, monkeypatch) -> None:
    head_dim = options.pop("head_dim", 8)
    model = config(attention=kind, attention_options=options, head_dim=head_dim)
    assert f"{kind} in torch" in describe_attention(model, CPU, dtype, True)
    monkeypatch.setattr(attention_backends, "runs_triton", lambda x: True)  # as on a GPU
    assert said in describe_attention(model, CPU, dtype, True)


def test_cudnn_goes_first_on_hopper_alone(monkeypatch) -> None:
    cuda, stock = torch.device("cuda", 0), torch._C._get_sdp_priority_order()
    for capability, first in (((9, 0), SDPBackend.CUDNN_ATTENTION), ((8, 0), None), ((10, 0), None)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        with sdpa_order(cuda):
            order = torch._C._get_sdp_priority_order()
            assert order == stock if first is None else order[0] == int(first)
        assert torch._C._get_sdp_priority_order() == stock
    with sdpa_order(CPU):
        assert torch._C._get_sdp_priority_order() == stock
