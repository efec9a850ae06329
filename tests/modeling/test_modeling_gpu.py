"""On a GPU: the values of the CPU, the dtype of the stream, documents kept apart by flex attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from llmnorm.modeling import LlmNormForCausalLM

ModelMaker = Callable[..., LlmNormForCausalLM]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_same_values_as_the_cpu(make_model: ModelMaker, tokens: Tensor, row: dict[str, Any]) -> None:
    here = make_model(**row)
    there = make_model(**row).cuda()
    losses = [here(tokens, labels=tokens).loss, there(tokens.cuda(), labels=tokens.cuda()).loss]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[1].cpu(), losses[0], rtol=1e-4, atol=1e-4)
    for a, b in zip(there.parameters(), here.parameters(), strict=True):
        scale = b.grad.abs().max().item()
        torch.testing.assert_close(a.grad.cpu(), b.grad, rtol=0, atol=1e-3 * scale)


@pytest.mark.parametrize("residual_dtype", [None, "fp32", "bf16"])
def test_stream_dtype_under_autocast(
    make_model: ModelMaker, tokens: Tensor, row: dict[str, Any], residual_dtype: str | None
) -> None:
    """CUDA's autocast widens layer_norm to fp32; the stream must not follow."""
    model = make_model(**row, residual_dtype=residual_dtype).cuda().train()
    seen: set[torch.dtype] = set()
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, inputs, x: seen.add(x.dtype))
    with torch.autocast("cuda", dtype=torch.bfloat16):
        model(tokens.cuda(), labels=tokens.cuda(), use_cache=False).loss.backward()
    assert seen == {torch.bfloat16 if residual_dtype == "bf16" else torch.float32}


def test_flex_attention_separates_documents(make_model: ModelMaker) -> None:
    """head_dim 16, the least that flex attention's kernels take."""
    tokens = torch.randint(0, 61, (2, 128), device="cuda")
    positions = torch.cat([torch.arange(50), torch.arange(78)])[None].expand(2, -1).cuda()
    logits = []
    for implementation in ("sdpa", "flex_attention"):
        model = make_model(head_dim=16, attn_implementation=implementation).cuda()
        logits.append(model(tokens, position_ids=positions, use_cache=False).logits)
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-2, atol=1e-2)
