"""pre_rmsnorm is Llama and pre_ln is StableLM: logits and gradients on the same weights, to 1e-5 in fp32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, StableLmConfig, StableLmForCausalLM
from transformers.cache_utils import DynamicCache, StaticCache

from llmnorm.modeling import LlmNormForCausalLM

Pair = tuple[LlmNormForCausalLM, LlamaForCausalLM]
PairMaker = Callable[..., Pair]

# Both compute in fp32 in another order; logits are of order 1 to 10.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture
def make_pair(make_model: Callable[..., LlmNormForCausalLM], size: dict[str, Any]) -> PairMaker:
    """Our model and Llama with its weights; half of the usual amplification keeps logits of order 1."""

    def make(**changes: Any) -> Pair:
        ours = make_model(**changes)
        implementation = changes.pop("attn_implementation", None)
        llama = LlamaForCausalLM(
            LlamaConfig(**{**size, **changes}, attn_implementation=implementation)
        ).eval()
        llama.load_state_dict(ours.state_dict(), strict=True)
        return ours, llama

    return make


def _compare(ours: nn.Module, theirs: nn.Module, tokens: Tensor, **inputs: Any) -> None:
    """Logits, loss and every gradient; a parameter's gradient is compared on its own scale."""
    labels = inputs.pop("labels", tokens)
    mine = ours(tokens, labels=labels, use_cache=False, **inputs)
    other = theirs(tokens, labels=labels, use_cache=False, **inputs)
    seen = labels != -100
    torch.testing.assert_close(mine.logits[seen], other.logits[seen], **TOLERANCE)
    torch.testing.assert_close(mine.loss, other.loss, **TOLERANCE)
    mine.loss.backward()
    other.loss.backward()
    gradients = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None
        expected = gradients[name].grad
        scale = expected.abs().max().item()
        torch.testing.assert_close(parameter.grad, expected, rtol=0, atol=1e-5 * max(scale, 1e-3), msg=name)


VARIANTS: dict[str, dict[str, Any]] = {
    "grouped": {},
    "multi_head": {"num_key_value_heads": 4},
    "multi_query": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "head_dim": {"head_dim": 12},
    "gelu": {"hidden_act": "gelu_pytorch_tanh"},
    "padding_row": {"pad_token_id": 0},
    "eager": {"attn_implementation": "eager"},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}},
    "dynamic": {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 8},
    "yarn": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
    "llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_o3_same_as_llama(make_pair: PairMaker, tokens: Tensor, variant: str) -> None:
    ours, llama = make_pair(**VARIANTS[variant])
    assert list(ours.state_dict()) == list(llama.state_dict())
    _compare(ours, llama, tokens)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_o3_same_as_llama_with_padding(
    make_pair: PairMaker, tokens: Tensor, side: str, implementation: str
) -> None:
    mask = torch.ones_like(tokens)
    padded = (1, slice(0, 5)) if side == "left" else (1, slice(7, None))
    mask[padded] = 0
    ours, llama = make_pair(attn_implementation=implementation)
    _compare(ours, llama, tokens, attention_mask=mask, labels=tokens.masked_fill(mask == 0, -100))


def test_o3_same_as_llama_with_inputs_embeds(make_pair: PairMaker, tokens: Tensor) -> None:
    ours, llama = make_pair()
    embeddings = ours.model.embed_tokens(tokens).detach()
    torch.testing.assert_close(
        ours(inputs_embeds=embeddings).logits, llama(inputs_embeds=embeddings).logits, **TOLERANCE
    )


@pytest.mark.parametrize("cache", [DynamicCache, StaticCache])
def test_o3_same_as_llama_step_by_step(make_pair: PairMaker, tokens: Tensor, cache: type) -> None:
    """A prompt of 5, then one token at a time from the cache, against Llama without a cache."""
    ours, llama = make_pair()
    extra = {"max_cache_len": 16} if cache is StaticCache else {}
    past = cache(config=ours.config, **extra)
    steps = [tokens[:, :5], *tokens[:, 5:].split(1, dim=1)]
    with torch.no_grad():
        logits = torch.cat([ours(step, past_key_values=past, use_cache=True).logits for step in steps], dim=1)
        torch.testing.assert_close(logits, llama(tokens).logits, **TOLERANCE)


@pytest.mark.parametrize("kept", [0, 1, 3, torch.tensor([2, 7])])
def test_logits_to_keep(make_pair: PairMaker, tokens: Tensor, kept: int | Tensor) -> None:
    ours, llama = make_pair()
    mine = ours(tokens, logits_to_keep=kept).logits
    torch.testing.assert_close(mine, llama(tokens, logits_to_keep=kept).logits, **TOLERANCE)


def test_recorded_hidden_states_and_attentions(make_pair: PairMaker, tokens: Tensor) -> None:
    ours, llama = make_pair(attn_implementation="eager")
    mine = ours(tokens, output_hidden_states=True, output_attentions=True)
    other = llama(tokens, output_hidden_states=True, output_attentions=True)
    assert len(mine.hidden_states) == len(other.hidden_states) == 4
    assert len(mine.attentions) == len(other.attentions) == 3
    for a, b in zip(
        mine.hidden_states + mine.attentions, other.hidden_states + other.attentions, strict=True
    ):
        torch.testing.assert_close(a, b, **TOLERANCE)


def test_loss_arguments(make_pair: PairMaker, tokens: Tensor) -> None:
    """labels are shifted, shift_labels are not; num_items_in_batch replaces the count of labels."""
    ours, _ = make_pair()
    nll = torch.nn.functional.cross_entropy(
        ours(tokens).logits[:, :-1].reshape(-1, 61), tokens[:, 1:].reshape(-1), reduction="sum"
    )
    shifted = torch.cat([tokens[:, 1:], torch.full((2, 1), -100)], dim=1)
    torch.testing.assert_close(ours(tokens, labels=tokens).loss, nll / 22)
    torch.testing.assert_close(ours(tokens, shift_labels=shifted).loss, nll / 22)
    for count in (7, torch.tensor(7)):
        loss = ours(tokens, labels=shifted, shift_labels=shifted, num_items_in_batch=count).loss
        torch.testing.assert_close(loss, nll / 7)


def test_o11_pre_ln_is_stablelm(
    make_model: Callable[..., LlmNormForCausalLM], size: dict[str, Any], tokens: Tensor
) -> None:
    ours = make_model(norm="pre_ln")
    theirs = StableLmForCausalLM(
        StableLmConfig(
            **size,
            use_parallel_residual=False,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
            use_qkv_bias=False,
            qk_layernorm=False,
            layer_norm_eps=ours.config.rms_norm_eps,
        )
    ).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    _compare(ours, theirs, tokens)
