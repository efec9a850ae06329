"""Linear attention in the model: caching, padding, documents, hybrids, every norm, and what it refuses."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from llmnorm.modeling import LlmNormConfig, LlmNormForCausalLM
from llmnorm.modeling.linear_mixers import LlmNormLinearAttention
from llmnorm.modeling.recurrent_cache import RecurrentLayer, make_cache, restore_cache, snapshot_cache

ModelMaker = Callable[..., LlmNormForCausalLM]
GREEDY: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
SMALL = {"num_hidden_layers": 2}
# Every attention and every option that changes what is computed or kept.
MIXERS: dict[str, dict[str, Any]] = {
    "nalaformer": {"attention": "nalaformer"},
    "sla": {"attention": "sla"},
    "hybrid": {"attention": {"softmax_every": 2}},
    "softmax_first": {"attention": {"pattern": ["softmax", "sla"]}},
    "cosine": {"attention": "nalaformer", "attention_options": {"feature_map": "cosine", "chunk_size": 4}},
    "relu": {"attention": "nalaformer", "attention_options": {"feature_map": "relu", "floor": 0.0}},
    "bare": {
        "attention": "nalaformer",
        "attention_options": {
            "short_convolution": 0,
            "key_norm": False,
            "gate": False,
            "output_norm": False,
            "learned_scale": False,
            "query_norm": "l2",
        },
    },
    "rope_before": {"attention": "nalaformer", "attention_options": {"rope": "before"}},
    "rope_after": {
        "attention": "nalaformer",
        "attention_options": {"rope": "after", "value_convolution": 3, "chunk_size": 4},
    },
    "hybrid_with_rope": {
        "attention": {"pattern": ["nalaformer", "softmax"]},
        "attention_options": {"nalaformer": {"rope": "before"}, "softmax": {"gate": "head"}},
    },
    "off_by_one": {"attention_options": {"normalizer": "off_by_one", "gate": "elementwise"}},
    "sigmoid": {"attention_options": {"normalizer": "sigmoid"}},
}


@pytest.fixture(params=MIXERS.values(), ids=MIXERS.keys())
def mixer(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {**SMALL, **request.param}


def logits(model: LlmNormForCausalLM, tokens: Tensor, **more: Any) -> Tensor:
    with torch.no_grad():
        return model(tokens, **{"use_cache": False, **more}).logits


def test_cache_changes_nothing(make_model: ModelMaker, tokens: Tensor, mixer: dict[str, Any]) -> None:
    model = make_model(**mixer)
    mask = torch.ones_like(tokens)
    with_cache = model.generate(tokens, attention_mask=mask, **GREEDY)
    assert torch.equal(with_cache, model.generate(tokens, attention_mask=mask, use_cache=False, **GREEDY))
    assert len(set(with_cache[:, 12:].flatten().tolist())) > 2
    beams = {**GREEDY, "num_beams": 3, "attention_mask": mask}
    assert torch.equal(model.generate(tokens, **beams), model.generate(tokens, use_cache=False, **beams))


@pytest.mark.parametrize("name", ["nalaformer", "sla", "hybrid", "rope_after"])
def test_200_tokens_by_cache_equal_the_full_forward(
    make_model: ModelMaker, tokens: Tensor, name: str
) -> None:
    """fp32; logits of size 10 after 212 tokens of sums in another order: 1e-3."""
    model = make_model(**SMALL, **MIXERS[name], max_position_embeddings=256)
    out = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        output_logits=True,
        return_dict_in_generate=True,
        **{**GREEDY, "max_new_tokens": 200},
    )
    expected = logits(model, out.sequences)[:, 11:-1]
    torch.testing.assert_close(torch.stack(out.logits, 1), expected, atol=1e-3, rtol=1e-3)
    assert expected.abs().max() > 1


def test_o2_7_padding_changes_nothing(make_model: ModelMaker, tokens: Tensor, mixer: dict[str, Any]) -> None:
    """Left, right and none, with and without positions; finite at padding, and no gradient from there."""
    model = make_model(**mixer)
    alone = logits(model, tokens[1:, :7])
    padded = {"left": slice(5, 12), "right": slice(0, 7)}
    for side, place in padded.items():
        row = torch.full_like(tokens[1:], 60)
        row[:, place] = tokens[1:, :7]
        mask = torch.zeros_like(row)
        mask[:, place] = 1
        both = torch.cat((tokens[:1], row)), torch.cat((torch.ones_like(mask), mask))
        out = logits(model, both[0], attention_mask=both[1])
        assert torch.isfinite(out).all()
        torch.testing.assert_close(out[1:, place], alone, atol=2e-4, rtol=1e-4, msg=side)
        embedded = model.model.embed_tokens(both[0]).detach().requires_grad_()
        seen = model(inputs_embeds=embedded, attention_mask=both[1], use_cache=False).logits[1, place]
        seen.sin().sum().backward()
        assert embedded.grad is not None
        assert embedded.grad[1][mask[0] == 0].abs().max() == 0
        assert embedded.grad[1, place].abs().max() > 0


def test_left_padding_changes_nothing_in_generation(
    make_model: ModelMaker, tokens: Tensor, mixer: dict[str, Any]
) -> None:
    model = make_model(**mixer)
    short, mask, padded = tokens[1:, :7], torch.ones_like(tokens), tokens.clone()
    padded[1, :5], padded[1, 5:], mask[1, :5] = 0, short, 0
    together = model.generate(padded, attention_mask=mask, **GREEDY)
    alone = model.generate(short, attention_mask=torch.ones_like(short), **GREEDY)
    assert torch.equal(together[1:, 12:], alone[:, 7:])


def test_a_right_padded_prompt_goes_on(make_model: ModelMaker, tokens: Tensor) -> None:
    """The state and the convolutions' history are those of the last token that is not padding."""
    model = make_model(**SMALL, **MIXERS["rope_after"])
    mask = torch.ones_like(tokens)
    mask[1, 8:] = 0
    cache = make_cache(model.config)
    logits(model, tokens, attention_mask=mask, past_key_values=cache, use_cache=True)
    step = logits(model, tokens[:, :1], past_key_values=cache, use_cache=True)
    for row, length in ((0, 12), (1, 8)):
        whole = torch.cat((tokens[row, :length], tokens[row, :1]))[None]
        torch.testing.assert_close(step[row], logits(model, whole)[0, -1:], atol=1e-4, rtol=1e-4)


def test_o2_7_packed_documents_are_apart(
    make_model: ModelMaker, tokens: Tensor, mixer: dict[str, Any]
) -> None:
    model = make_model(**mixer)
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 0, 1, 2, 3, 4, 5]])
    packed = logits(model, tokens, position_ids=positions)
    for start, stop in ((0, 5), (5, 6), (6, 12)):
        torch.testing.assert_close(
            packed[:, start:stop], logits(model, tokens[:, start:stop]), atol=2e-4, rtol=1e-4
        )


def test_o2_6_split_prefill_and_resume(make_model: ModelMaker, tokens: Tensor, mixer: dict[str, Any]) -> None:
    model = make_model(**mixer)
    whole = logits(model, tokens)
    for cuts in ([1, 11], [3, 1, 8], [4, 4, 4], [11, 1], [1] * 12):
        cache, parts = make_cache(model.config), []
        for part in tokens.split(cuts, 1):
            parts.append(logits(model, part, past_key_values=cache, use_cache=True))
        torch.testing.assert_close(torch.cat(parts, 1), whole, atol=2e-4, rtol=1e-4, msg=str(cuts))
        assert cache.get_seq_length() == 12


def test_o2_9_beam_reorder(make_model: ModelMaker, tokens: Tensor) -> None:
    model = make_model(**SMALL, **MIXERS["rope_after"])
    order = torch.tensor([1, 1, 0])
    cache = make_cache(model.config)
    logits(model, tokens, past_key_values=cache, use_cache=True)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 2]))
    cache.reorder_cache(order)
    step = logits(model, tokens[:1, :1].expand(3, 1), past_key_values=cache, use_cache=True)
    permuted = torch.cat((tokens[order], tokens[:1, :1].expand(3, 1)), 1)
    torch.testing.assert_close(step, logits(model, permuted)[:, -1:], atol=1e-4, rtol=1e-4)


def test_snapshot_restore_and_reset(make_model: ModelMaker, tokens: Tensor) -> None:
    model = make_model(**SMALL, **MIXERS["hybrid"])
    cache = make_cache(model.config)
    first = logits(model, tokens[:, :5], past_key_values=cache, use_cache=True)
    kept = snapshot_cache(cache)
    expected = logits(model, tokens[:, 5:], past_key_values=cache, use_cache=True)
    for _ in range(2):
        restore_cache(cache, kept)
        assert cache.get_seq_length() == 5
        assert torch.equal(logits(model, tokens[:, 5:], past_key_values=cache, use_cache=True), expected)
    linear_only = make_model(**SMALL, **MIXERS["sla"])
    cache = make_cache(linear_only.config)
    first = logits(linear_only, tokens, past_key_values=cache, use_cache=True)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(logits(linear_only, tokens, past_key_values=cache, use_cache=True), first)


def test_crop_raises(make_model: ModelMaker, tokens: Tensor) -> None:
    model = make_model(**SMALL, **MIXERS["hybrid"])
    cache = make_cache(model.config)
    logits(model, tokens, past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match="take a snapshot_cache before"):
        cache.crop(-1)
    cache.activate_past_recording()
    with pytest.raises(ValueError, match=r"records the past.*snapshot_cache"):
        logits(model, tokens, past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        model.generate(tokens[:1], prompt_lookup_num_tokens=2, **GREEDY)


def test_the_cache_holds_what_the_layers_need(make_model: ModelMaker, tokens: Tensor) -> None:
    """Keys and values in the softmax layers alone; elsewhere a state whose size no token changes."""
    model = make_model(num_hidden_layers=4, attention={"softmax_every": 2})
    cache = model(tokens, use_cache=True).past_key_values
    assert [type(layer) is RecurrentLayer for layer in cache.layers] == [True, False, True, False]
    state = cache.layers[0].recurrent_states[0]
    # 2 key-value heads of 8: 2 * 8 features and the floor; 8 values and the normalizer.
    assert state.shape == (2, 2, 17, 9) and state.dtype == torch.float32
    assert cache.layers[0].conv_states[0].shape == (2, 64, 3)
    assert cache.layers[0].recurrent_states[1].tolist() == [[12], [12]]
    model.bfloat16()
    cache = model(tokens, use_cache=True).past_key_values
    assert cache.layers[0].recurrent_states[0].dtype == torch.float32


def test_a_cache_of_transformers_own_making(make_model: ModelMaker, tokens: Tensor) -> None:
    model = make_model(**SMALL, attention="nalaformer")
    cache = DynamicCache(config=model.config)
    logits(model, tokens[:, :6], past_key_values=cache, use_cache=True)
    step = logits(model, tokens[:, 6:], past_key_values=cache, use_cache=True)
    torch.testing.assert_close(step, logits(model, tokens)[:, 6:], atol=1e-4, rtol=1e-4)
    mask = torch.ones_like(tokens)
    model.generate(tokens, attention_mask=mask, past_key_values=DynamicCache(config=model.config), **GREEDY)
    with pytest.raises(ValueError, match=r"make the cache with DynamicCache\(config=model.config\)"):
        model(tokens, past_key_values=DynamicCache(), use_cache=True)


def test_o2_3_causality(make_model: ModelMaker, tokens: Tensor, mixer: dict[str, Any]) -> None:
    model = make_model(**mixer)
    out = logits(model, tokens)
    for place in (0, 5, 11):
        changed = tokens.clone()
        changed[:, place] = (changed[:, place] + 1) % 61
        again = logits(model, changed)
        torch.testing.assert_close(again[:, :place], out[:, :place], atol=1e-6, rtol=0)
        assert (again[:, place:] - out[:, place:]).abs().amax() > 1e-3


def test_every_norm_trains(make_model: ModelMaker, tokens: Tensor, row: dict[str, Any]) -> None:
    """Each placement with a linear layer: finite gradients everywhere, and steps downhill lower the loss."""
    if row["norm"] == "ngpt":
        with pytest.raises(ValueError, match=r"attention=.* is not defined for norm=ngpt"):
            make_model(**row, attention={"pattern": ["nalaformer"]})
        return
    model = make_model(**row, attention={"pattern": ["nalaformer"]}, plain=True).train()
    losses = []
    for _ in range(3):
        model.zero_grad()
        loss = model(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            for parameter in model.parameters():
                assert parameter.grad is not None and torch.isfinite(parameter.grad).all()
                parameter -= 0.01 * parameter.grad
    assert losses[2] < losses[0]


def test_activation_checkpointing(make_model: ModelMaker, tokens: Tensor) -> None:
    model = make_model(**SMALL, **MIXERS["hybrid"]).train()
    results = []
    for mode in ("none", "full", "selective"):
        model.set_activation_checkpointing(mode)
        model.zero_grad()
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        results.append([parameter.grad.clone() for parameter in model.parameters()])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("name", ["nalaformer", pytest.param("sla", marks=pytest.mark.slow)])
def test_one_graph_under_compile(make_model: ModelMaker, tokens: Tensor, name: str) -> None:
    model = make_model(**SMALL, **MIXERS[name])
    expected = model(tokens, labels=tokens, use_cache=False).loss
    expected.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    torch._dynamo.reset()
    for layer in model.model.layers:
        layer.compile(fullgraph=True, backend="aot_eager")
    loss = model(tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=1e-5 * gradient.abs().max().item())


def test_patterns() -> None:
    def names(attention: Any, layers: int) -> list[str]:
        return LlmNormConfig(attention=attention, num_hidden_layers=layers).layer_attentions

    assert names("sla", 2) == ["sla", "sla"]
    assert names({"pattern": ["nalaformer", "sla", "softmax"]}, 6) == ["nalaformer", "sla", "softmax"] * 2
    assert names({"softmax_every": 4, "linear": "sla"}, 8) == (["sla"] * 3 + ["softmax"]) * 2


def test_o1_7_a_silent_token_stays_finite(make_model: ModelMaker, tokens: Tensor) -> None:
    """All projections of queries zero: every layer falls back on its floor, with finite gradients."""
    model = make_model(**SMALL, attention="nalaformer").train()
    for module in model.modules():
        if isinstance(module, LlmNormLinearAttention):
            torch.nn.init.zeros_(module.q_proj.weight)
    loss = model(tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"attention": {"pattern": ["nalaformer", "softmax"]}},
            "attention.pattern repeats every 2 layers, which does not "
            "divide num_hidden_layers=3; use one of 1",
        ),
        ({"attention": {"softmax_every": 4}}, "attention.softmax_every repeats every 4 layers"),
        ({"attention": {"softmax_every": 1}}, "attention.softmax_every=1 must be an integer of at least 2"),
        (
            {"attention": {"softmax_every": 3, "linear": "softmax"}},
            "attention.linear='softmax' is not a choice",
        ),
        (
            {"attention": {"patern": ["sla"]}},
            "attention.patern is not a key of attention; did you mean pattern?",
        ),
        ({"attention": {"pattern": []}}, "pattern must be a list of names"),
        ({"attention": {"pattern": ["nala"]}}, "attention='nala' is not a choice"),
        ({"attention": "nala_former"}, "attention='nala_former' is not a choice; did you mean nalaformer?"),
        (
            {"attention": "nalaformer", "attention_options": {"chunk_size": 48}},
            "attention_options.chunk_size=48 must be a power of two",
        ),
        (
            {"attention": "nalaformer", "attention_options": {"lambda": -3.0}},
            "attention_options.lambda=-3.0 must be a number above 0",
        ),
        (
            {"attention": "nalaformer", "attention_options": {"lambda": 0.5}},
            "attention_options.lambda=0.5 with tau=0.5 keeps the exponent",
        ),
        (
            {"attention": "nalaformer", "attention_options": {"feature_map": "relu", "lambda": 2.0}},
            "attention_options.lambda=2.0 does nothing with feature_map=relu",
        ),
        (
            {"attention": "nalaformer", "attention_options": {"rope": "after", "output_norm": False}},
            "attention_options.rope=after rotates features, so that weights may be negative",
        ),
        (
            {"attention": "sla", "attention_options": {"lambda": 3.0}},
            "attention_options.lambda is not an option of attention=sla",
        ),
        (
            {"attention": "sla", "attention_options": {"value_convolution": 1}},
            "attention_options.value_convolution=1 must be 0 (none) or at least 2",
        ),
        (
            {"attention": {"pattern": ["sla"]}, "attention_options": {"floor": 0.1}},
            "attention_options.floor is for an attention that no layer has",
        ),
        (
            {"attention_options": {"gate": "heads"}},
            "attention_options.gate='heads' must be one of none, head",
        ),
    ],
)
def test_mistakes_name_the_key(
    make_config: Callable[..., LlmNormConfig], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make_config(**changes)


def test_a_mask_for_pairs_is_refused(make_model: ModelMaker, tokens: Tensor) -> None:
    model = make_model(**SMALL, attention="sla")
    with pytest.raises(ValueError, match="attention_mask has 4 dimensions; linear attention takes"):
        model(tokens, attention_mask=torch.ones(2, 1, 12, 12, dtype=torch.bool))
