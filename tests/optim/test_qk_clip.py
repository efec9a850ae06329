"""QK-clip: the logits it sees, what it does to heads above and below the threshold, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from transformers.masking_utils import create_causal_mask

from llmnorm.errors import UserError
from llmnorm.modeling import LlmNormConfig, LlmNormForCausalLM, initialize_weights
from llmnorm.modeling.max_logits import CHUNK, max_logits
from llmnorm.modeling.rotary import apply_rotary
from llmnorm.optim import QKClip, create_optimizer

HEADS, DIM, LENGTH = 4, 8, 12


def build(key_heads: int = HEADS, seed: int = 0, **changes) -> LlmNormForCausalLM:
    values = {
        "vocab_size": 32,
        "hidden_size": HEADS * DIM,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "num_key_value_heads": key_heads,
        "attention_bias": True,
        "initializer_range": 0.4,
        **changes,
    }
    model = LlmNormForCausalLM(LlmNormConfig(**values))
    initialize_weights(model, seed)
    with torch.no_grad():
        for layer in model.model.layers:
            if layer.self_attn.q_proj.bias is not None:
                layer.self_attn.q_proj.bias.normal_(generator=torch.Generator().manual_seed(1))
    return model.train()


def tokens(rows: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randint(32, (rows, LENGTH), generator=torch.Generator().manual_seed(seed))


def naive_maxima(model, input_ids, **inputs) -> torch.Tensor:
    """[layers, heads]: from the full matrix of logits, through hooks on the projections' outputs."""
    found, handles = [], []

    def observe(module, args, kwargs, output):
        z, (cos, sin) = args[0], kwargs["position_embeddings"]
        heads = (*z.shape[:-1], -1, DIM)
        q = module.q_norm(module.q_proj(z).view(heads)).transpose(1, 2)
        k = module.k_norm(module.k_proj(z).view(heads)).transpose(1, 2)
        q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], dim=1).mT / math.sqrt(DIM)
        seen = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
        if "position_ids" in inputs:
            document = (inputs["position_ids"] == 0).cumsum(-1)
            seen = (seen & (document[:, :, None] == document[:, None, :]))[:, None]
        found.append(scores.masked_fill(~seen, -torch.inf).amax((0, 2, 3)))

    for layer in model.model.layers:
        handles.append(layer.self_attn.register_forward_hook(observe, with_kwargs=True))
    with torch.no_grad():
        model(input_ids=input_ids, use_cache=False, **inputs)
    for handle in handles:
        handle.remove()
    return torch.stack(found)


def standing_still(method: str, model, tau: float):
    """An optimizer of lr 0: what changes, the clip has changed."""
    optimizer = create_optimizer(method, model, lr=1.0, qk_clip=tau)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    return optimizer


def step(model, optimizer, *batches, **inputs) -> None:
    for batch in batches:
        model(input_ids=batch, labels=batch, use_cache=False, **inputs).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize("documents", [False, True], ids=["one", "documents"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_maxima_are_those_of_the_full_matrix(key_heads, documents, implementation, monkeypatch):
    monkeypatch.setattr("llmnorm.modeling.max_logits.CHUNK", 5)  # 12 queries in chunks of 5, 5 and 2
    model = build(key_heads)
    model.config._attn_implementation = implementation
    inputs = {}
    if documents:  # of 5, 4 and 3 tokens
        inputs["position_ids"] = torch.cat([torch.arange(n) for n in (5, 4, 3)]).expand(3, -1)
    clip = QKClip(model, 1e9)
    naive = naive_maxima(model, tokens(), **inputs)
    clip.clip()
    assert clip.largest is not None
    # Sums of 8 fp32 products in another order.
    torch.testing.assert_close(clip.largest, naive, rtol=1e-5, atol=1e-5)
    whole = naive_maxima(model, tokens())
    assert documents is not torch.equal(naive, whole), "the documents must matter for the test to"


@pytest.mark.slow  # torch compiles the making of block masks
@pytest.mark.parametrize("documents", [False, True], ids=["one", "documents"])
def test_flex_attentions_block_mask_bounds_what_is_seen(documents):
    """The mask alone: its kernel takes minutes to compile on a processor."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(3, heads, LENGTH, DIM, generator=generator) for heads in (4, 2))
    positions = torch.cat([torch.arange(n) for n in (5, 4, 3)]).expand(3, -1) if documents else None
    config = LlmNormConfig(hidden_size=HEADS * DIM, num_attention_heads=HEADS)
    masks = []
    for config._attn_implementation in ("flex_attention", "eager"):
        masks.append(
            create_causal_mask(
                config=config,
                inputs_embeds=torch.zeros(3, LENGTH, HEADS * DIM),
                attention_mask=None,
                past_key_values=None,
                position_ids=positions,
            )
        )
    block, additive = masks
    scores = q @ k.repeat_interleave(2, dim=1).mT + additive
    torch.testing.assert_close(max_logits(q, k, 1.0, block), scores.amax((0, 2, 3)))


def test_flash_attentions_offsets_and_padding_masks_bound_what_is_seen():
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, heads, 6, DIM, generator=generator) for heads in (4, 2))
    scores = q @ k.repeat_interleave(2, dim=1).mT * 0.5
    causal = torch.ones(6, 6, dtype=torch.bool).tril().expand(2, 1, 6, 6)
    offsets = torch.tensor([0, 4, 6, 8, 12], dtype=torch.int32)  # rows of 4 + 2 and 2 + 4 tokens
    document = torch.tensor([[0, 0, 0, 0, 1, 1], [2, 2, 3, 3, 3, 3]])
    seen = causal & (document[:, None, :, None] == document[:, None, None, :])
    expected = scores.masked_fill(~seen, -torch.inf).amax((0, 2, 3))
    torch.testing.assert_close(max_logits(q, k, 0.5, None, offsets), expected)
    padding = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    expected = scores.masked_fill(~(causal & padding[:, None, None].bool()), -torch.inf).amax((0, 2, 3))
    torch.testing.assert_close(max_logits(q, k, 0.5, padding), expected)
    # Queries behind a cache: the last two of six positions.
    expected = scores.masked_fill(~causal, -torch.inf)[:, :, 4:].amax((0, 2, 3))
    torch.testing.assert_close(max_logits(q[:, :, 4:], k, 0.5, None), expected)


def test_more_queries_than_a_chunk():
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, CHUNK + 3, 2, generator=generator) for _ in range(2))
    scores = (q @ k.mT).masked_fill(~torch.ones(CHUNK + 3, CHUNK + 3, dtype=torch.bool).tril(), -torch.inf)
    torch.testing.assert_close(max_logits(q, k, 1.0, None), scores.amax((0, 2, 3)))


@pytest.mark.parametrize("method", ["muon", "normuon", "lanton"])
@pytest.mark.parametrize("key_heads", [4, 2], ids=["mha", "gqa"])
def test_card_3_4_a_head_above_tau_ends_at_tau_and_one_below_is_not_touched(method, key_heads):
    model = build(key_heads)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    naive = naive_maxima(model, tokens())
    tau = naive.median().item()
    optimizer = standing_still(method, model, tau)
    step(model, optimizer, tokens())
    gamma = tau / naive.clamp(min=tau)
    assert 0 < int((gamma < 1).sum()) < gamma.numel()
    # Layer 1's input changes with layer 0's attention; the first layer sees the same batch again.
    torch.testing.assert_close(naive_maxima(model, tokens())[0], naive[0].clamp(max=tau), rtol=1e-5, atol=0)
    for name, tensor in model.state_dict().items():
        layer, side = (int(name.split(".")[2]), name.split(".")[4]) if "self_attn" in name else (0, "")
        old = before[name]
        if side in ("q_proj", "k_proj") and not (side == "k_proj" and key_heads < HEADS):
            factor = gamma[layer].sqrt() if key_heads == HEADS else gamma[layer]
            torch.testing.assert_close(
                tensor.unflatten(0, (HEADS, DIM)),
                old.unflatten(0, (HEADS, DIM)) * factor.view(-1, 1, *[1] * (old.ndim - 1)),
                rtol=1e-6,
                atol=0,
            )
            for head in (gamma[layer] == 1).nonzero().flatten().tolist():
                rows = slice(head * DIM, (head + 1) * DIM)
                assert torch.equal(tensor[rows], old[rows]), f"{name}: head {head} is below tau"
        else:
            assert torch.equal(tensor, old), f"{name} has nothing to do with the logits' scale"


def test_clipping_every_layer_ends_every_head_at_tau_once_the_input_stands_still():
    """Repeated at lr 0 the clip reaches a fixed point: no head above tau."""
    model = build()
    tau = naive_maxima(model, tokens()).median().item()
    optimizer = standing_still("muon", model, tau)
    for _ in range(4):
        step(model, optimizer, tokens())
    assert naive_maxima(model, tokens()).max().item() <= tau * (1 + 1e-5)


def test_the_maximum_is_over_the_micro_batches_of_one_step_only():
    model = build()
    optimizer = standing_still("muon", model, 1e9)
    first, second = tokens(seed=1), tokens(seed=2)
    separate = [naive_maxima(model, batch) for batch in (first, second)]
    optimizer.qk_clip.forget()
    step(model, optimizer, first, second)
    torch.testing.assert_close(optimizer.qk_clip.largest, torch.maximum(*separate), rtol=1e-5, atol=1e-5)
    step(model, optimizer, second)
    torch.testing.assert_close(optimizer.qk_clip.largest, separate[1], rtol=1e-5, atol=1e-5)
    model.eval()
    with torch.no_grad():
        model(input_ids=first)
    assert bool(model.model.layers[0].self_attn.max_logits.isinf().all()), "evaluation is not training"


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_checkpointed_activations_give_the_same_maxima_and_gradients(mode):
    results = []
    for chosen in ("none", mode):
        model = build()
        model.set_activation_checkpointing(chosen)
        optimizer = create_optimizer("muon", model, lr=0.1, qk_clip=1.0)
        step(model, optimizer, tokens())
        results.append((optimizer.qk_clip.largest, model.model.layers[0].self_attn.q_proj.weight))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_a_norm_over_the_width_takes_the_factor_into_its_gains():
    model = build(norm="reordered")
    naive = naive_maxima(model, tokens())
    tau = naive[0].median().item()
    optimizer = standing_still("muon", model, tau)
    projection = model.model.layers[0].self_attn.q_proj.weight.clone()
    step(model, optimizer, tokens())
    torch.testing.assert_close(naive_maxima(model, tokens())[0], naive[0].clamp(max=tau), rtol=1e-5, atol=0)
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, projection)


def test_a_norm_over_each_head_and_the_sphere_are_refused_by_name():
    with pytest.raises(
        UserError, match=r"cannot scale model\.layers\.0\.self_attn: its queries and keys stay"
    ):
        create_optimizer("muon", build(norm="ngpt", attention_bias=False), lr=1e-3, qk_clip=100.0)
    with pytest.raises(UserError, match=r"qk_clip=100.0 cannot scale model.layers.0.self_attn: its q_norm"):
        create_optimizer("muon", build(norm="qk_norm"), lr=1e-3, qk_clip=100.0)


def test_a_model_that_does_not_know_its_logits_and_a_threshold_of_zero_are_refused(llama):
    with pytest.raises(UserError, match="LlamaForCausalLM has none"):
        create_optimizer("muon", llama(), lr=1e-3, qk_clip=100.0)
    with pytest.raises(UserError, match=r"optimizer\.qk_clip=0\.0 must be greater than 0"):
        create_optimizer("muon", build(), lr=1e-3, qk_clip=0.0)
    with pytest.raises(UserError, match=r"optimizer\.qk_clip=100.0 is not an option of adamw"):
        create_optimizer("adamw", build(), lr=1e-3, qk_clip=100.0)
