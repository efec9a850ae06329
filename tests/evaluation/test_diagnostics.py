"""Every quantity of `diagnose` against its definition, computed another way: no hooks, plain loops."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llmnorm.errors import UserError
from llmnorm.evaluation import diagnose, perplexity
from llmnorm.evaluation.attention_statistics import AttentionStatistics
from llmnorm.evaluation.gain_drift import drift, find_gains
from llmnorm.evaluation.layer_effects import find_blocks, removed
from llmnorm.evaluation.stream_statistics import StreamStatistics, angular_distances, growth
from llmnorm.export import fold_to_stock
from llmnorm.modeling import LlmNormConfig, LlmNormForCausalLM

VOCAB_SIZE, CONTEXT, LAYERS, HEADS = 61, 12, 3, 4
# fp32 against fp64 sums over a few hundred numbers.
CLOSE = {"rel": 2e-5, "abs": 1e-7}


SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def build(norm: str = "pre_rmsnorm", **options: Any) -> LlmNormForCausalLM:
    """A tiny model with weights and gains far from their initial ones, so that no two layers are alike."""
    config = LlmNormConfig(**SIZES, norm=norm, **options)
    torch.manual_seed(0)
    model = LlmNormForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(
                torch.randn_like(parameter) * 0.4
                if parameter.ndim > 1
                else parameter + 0.3 * torch.randn_like(parameter)
            )
            if name.endswith("gate"):
                parameter.fill_(0.7)
    return model.eval()


@pytest.fixture(scope="module")
def ids() -> np.ndarray:
    return np.random.default_rng(3).integers(0, VOCAB_SIZE, 7 * CONTEXT + 5)


def windows(ids: np.ndarray) -> Tensor:
    """[7, CONTEXT + 1]: the full windows of `ids`."""
    return torch.from_numpy(np.stack([ids[k * CONTEXT : (k + 1) * CONTEXT + 1] for k in range(7)]))


def streams_of(model: LlmNormForCausalLM, tokens: Tensor) -> list[Tensor]:
    """x_0 ... x_L, by calling the layers one after the other."""
    inner = model.model
    x = inner.embed_tokens(tokens)
    positions = torch.arange(tokens.shape[1])[None]
    cos, sin = inner.rotary_emb(x, positions)
    found = [x]
    for layer in inner.layers:
        x = layer(x, attention_mask=None, position_embeddings=(cos.unsqueeze(1), sin.unsqueeze(1)))
        found.append(x)
    return found


@pytest.fixture(scope="module", params=["pre_rmsnorm", "post_ln", "gpas"])
def case(request: pytest.FixtureRequest, ids: np.ndarray) -> tuple[LlmNormForCausalLM, dict[str, Any]]:
    model = build(request.param)
    return model, diagnose(model, ids, CONTEXT, batch_size=3, removal=False)


def tokenwise(model: LlmNormForCausalLM, ids: np.ndarray) -> np.ndarray:
    """[L + 1, sequences, CONTEXT, d] in fp64."""
    with torch.no_grad():
        return np.stack([x.double().numpy() for x in streams_of(model, windows(ids)[:, :-1])])


def test_d1_variance_and_second_moment(case, ids) -> None:
    model, found = case
    x = tokenwise(model, ids)
    mean = x.sum(-1) / x.shape[-1]
    second = (x**2).sum(-1) / x.shape[-1]
    for number in range(LAYERS + 1):
        assert found["stream_second_moment"][number] == pytest.approx(second[number].mean(), **CLOSE)
        assert found["stream_rms"][number] == pytest.approx(math.sqrt(second[number].mean()), **CLOSE)
        assert found["stream_variance"][number] == pytest.approx((second - mean**2)[number].mean(), **CLOSE)
    assert (found["sequences"], found["tokens"]) == (7, 7 * CONTEXT)


def test_d1_growth_tells_exponential_from_polynomial() -> None:
    exponential = growth([math.exp(0.3 * depth) for depth in range(1, 9)])
    polynomial = growth([depth**1.7 for depth in range(1, 9)])
    assert exponential and polynomial
    assert exponential["exponential"] == {"slope": pytest.approx(0.3), "r2": pytest.approx(1.0)}
    assert polynomial["power"] == {"slope": pytest.approx(1.7), "r2": pytest.approx(1.0)}
    assert exponential["power"]["r2"] < 0.97 and polynomial["exponential"]["r2"] < 0.97
    assert growth([1.0, 0.0, 2.0]) is None and growth([1.0, 2.0]) is None


def test_d3_golden_angle() -> None:
    """The two vectors of the nGPT golden step, norms.md section 0.1."""
    x, target = torch.tensor([1.0, -2.0, 3.0, 0.5]), torch.tensor([0.0, 1.0, 1.0, 0.0])
    angles = angular_distances(torch.stack([x, target, x]).double()[None])[0]
    assert float(angles[0, 1]) == pytest.approx(0.44002079, abs=1e-8)
    assert float(angles[0, 0]) == 0.0 and float(angles[0, 2]) < 1e-7


def test_d3_angular_distance_of_the_last_token(case, ids) -> None:
    model, found = case
    last = tokenwise(model, ids)[:, :, -1]
    for first in range(LAYERS + 1):
        for second in range(first + 1, LAYERS + 1):
            angles = [
                math.acos(float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))) / math.pi
                for a, b in zip(last[first], last[second], strict=True)
            ]
            expected = pytest.approx(sum(angles) / len(angles), rel=1e-4)
            assert found["angular_distance_matrix"][first][second] == expected
            assert found["angular_distance_matrix"][second][first] == expected
            if second == first + 1:
                assert found["angular_distance"][first] == expected


def test_d5_block_influence_and_d3_relative_update(case, ids) -> None:
    model, found = case
    x = tokenwise(model, ids).reshape(LAYERS + 1, -1, 16)
    length = np.sqrt((x**2).sum(-1))
    for number in range(LAYERS):
        before, after = x[number], x[number + 1]
        cosine = (before * after).sum(-1) / (length[number] * length[number + 1])
        assert found["block_influence"][number] == pytest.approx((1 - cosine).mean(), rel=1e-4)
        moved = np.sqrt(((after - before) ** 2).sum(-1)) / length[number]
        assert found["relative_update"][number] == pytest.approx(moved.mean(), **CLOSE)


def test_d2_gradient_norms_per_layer(case, ids) -> None:
    """Full batches only (2 of 3 sequences), the mean-token loss, the mean of norms."""
    model, found = case
    model = copy.deepcopy(model)
    norms, stream_norms = [], []
    for rows in windows(ids)[:6].split(3):
        model.zero_grad()
        streams = streams_of(model, rows[:, :-1])
        for x in streams:
            x.retain_grad()
        logits = model.lm_head(model.model.norm(streams[-1]))
        F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).backward()
        squares = dict.fromkeys(["0", "1", "2", "embed_tokens", "norm", "lm_head"], 0.0)
        for name, parameter in model.named_parameters():
            part = name.split(".")[2] if ".layers." in name else name.split(".")[-2]
            squares[part] += float(parameter.grad.double().square().sum())  # type: ignore[union-attr]
        norms.append({part: math.sqrt(square) for part, square in squares.items()})
        stream_norms.append([float(x.grad.double().norm()) for x in streams])  # type: ignore[union-attr]
    assert found["gradient_batches"] == 2
    for number in range(LAYERS):
        expected = (norms[0][str(number)] + norms[1][str(number)]) / 2
        assert found["gradient_norm"][number] == pytest.approx(expected, rel=1e-4)
    for part in ("embed_tokens", "norm", "lm_head"):
        expected = (norms[0][part] + norms[1][part]) / 2
        assert found["gradient_norm_outside"][part] == pytest.approx(expected, rel=1e-4)
    for number in range(LAYERS + 1):
        expected = (stream_norms[0][number] + stream_norms[1][number]) / 2
        assert found["stream_gradient_norm"][number] == pytest.approx(expected, rel=1e-4)
    assert all(parameter.grad is None for parameter in case[0].parameters())


def scores_of(model: LlmNormForCausalLM, tokens: Tensor) -> list[Tensor]:
    """q k^T / sqrt(D) of every layer [B, H, T, T], head by head, with complex numbers for the rotation."""
    inner, found = model.model, []
    for layer, x in zip(inner.layers, streams_of(model, tokens), strict=False):
        z, attention = layer.input_layernorm(x), layer.self_attn
        size = attention.head_dim
        angles = torch.arange(tokens.shape[1])[:, None] * 10000.0 ** (-torch.arange(0, size, 2) / size)

        def rotated(y: Tensor, size: int = size, angles: Tensor = angles) -> Tensor:
            pairs = torch.complex(y[..., : size // 2].double(), y[..., size // 2 :].double())
            return pairs * torch.polar(torch.ones_like(angles), angles).to(pairs.dtype)

        queries = attention.q_proj(z).split(size, -1)
        keys = attention.k_proj(z).split(size, -1)
        maps = []
        for head, query in enumerate(queries):
            q, k = rotated(query), rotated(keys[head // (len(queries) // len(keys))])
            maps.append((q @ k.transpose(-1, -2).conj()).real / math.sqrt(size))
        found.append(torch.stack(maps, 1))
    return found


def test_d8_entropy_and_largest_logit(case, ids) -> None:
    model, found = case
    with torch.no_grad():
        maps = scores_of(model, windows(ids)[:, :-1])
    for layer, scores in enumerate(maps):
        entropy = np.zeros((HEADS, 7, CONTEXT))
        largest = np.full(HEADS, -np.inf)
        for head in range(HEADS):
            for row in range(7):
                for t in range(CONTEXT):
                    seen = scores[row, head, t, : t + 1].numpy()
                    p = np.exp(seen - seen.max()) / np.exp(seen - seen.max()).sum()
                    entropy[head, row, t] = -(p * np.log(p)).sum()
                    largest[head] = max(largest[head], seen.max())
        relative = entropy[:, :, 1:] / np.log(np.arange(2, CONTEXT + 1))
        assert found["attention_entropy_heads"][layer] == pytest.approx(entropy.mean((1, 2)), rel=1e-4)
        assert found["attention_entropy"][layer] == pytest.approx(entropy.mean(), rel=1e-4)
        assert found["attention_relative_entropy"][layer] == pytest.approx(relative.mean(), rel=1e-4)
        assert found["max_attention_logit_heads"][layer] == pytest.approx(largest, rel=1e-4)
        assert found["max_attention_logit"][layer] == pytest.approx(largest.max(), rel=1e-4)
    assert found["attention_unavailable"] == {}


def test_d8_rows_of_the_map_at_a_time_change_nothing(ids, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = build(), windows(ids)[:, :-1]
    logits = []
    for limit in (2**24, 7 * HEADS * CONTEXT * 5):
        monkeypatch.setattr("llmnorm.evaluation.attention_statistics.MAP_ELEMENTS", limit)
        statistics = AttentionStatistics(LAYERS, HEADS, torch.device("cpu"))
        with torch.no_grad(), statistics.watching(model):
            logits.append(model(input_ids=tokens).logits)
        result = statistics.result(["A"] * LAYERS)
        if limit == 2**24:
            first = result
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(logits[0], model(input_ids=tokens).logits, rtol=1e-4, atol=1e-4)
    assert result["attention_entropy"] == pytest.approx(first["attention_entropy"], rel=1e-5)
    assert result["max_attention_logit"] == pytest.approx(first["max_attention_logit"], rel=1e-6)
    assert model.config._attn_implementation == "sdpa" and "eager" not in ALL_ATTENTION_FUNCTIONS


def test_d8_other_normalizers_and_linear_attention_are_null_with_the_reason(ids) -> None:
    found = diagnose(build(attention_options={"normalizer": "sigmoid"}), ids, CONTEXT, removal=False)
    assert set(found["attention_unavailable"].values()) == {"sigmoid_attention computes no softmax map"}
    assert found["attention_entropy"] == [None] * LAYERS
    linear = diagnose(build(attention="nalaformer"), ids, CONTEXT, removal=False)
    assert linear["attention_entropy"] == [None] * LAYERS and len(linear["attention_unavailable"]) == LAYERS
    assert min(linear["stream_variance"]) > 0


def test_a_compressed_stream_is_measured_with_all_its_features(ids) -> None:
    """Pre-CRMSNorm carries d - 1 features and zeros up to a multiple of 8; the last is minus their sum."""
    model = build("pre_crmsnorm")
    captured: list[Tensor] = []
    hooks = [layer.register_forward_hook(lambda m, a, x: captured.append(x)) for layer in model.model.layers]
    with torch.no_grad():
        model(input_ids=windows(ids)[:, :-1])
    for hook in hooks:
        hook.remove()
    found = diagnose(model, ids, CONTEXT, removal=False)
    for number, x in enumerate(captured, start=1):
        held = x.double().numpy()[..., :15]
        full = np.concatenate([held, -held.sum(-1, keepdims=True)], -1)
        assert found["stream_variance"][number] == pytest.approx((full**2).mean(), **CLOSE)


def test_d8_attention_without_a_softmax_map_is_null_with_the_reason(ids) -> None:
    class Average(nn.Module):
        def forward(self, z: Tensor, **inputs: Any) -> tuple[Tensor, None]:
            return z.cumsum(1) / torch.arange(1, z.shape[1] + 1)[:, None], None

    model = build()
    model.model.layers[1].self_attn = Average()
    found = diagnose(model, ids, CONTEXT, removal=False)
    assert found["attention_unavailable"] == {"layer 2": "Average computes no softmax map"}
    assert found["attention_entropy"][1] is None and found["max_attention_logit"][1] is None
    assert None not in (found["attention_entropy"][0], found["attention_entropy"][2])


@pytest.mark.parametrize("norm", ["mix_ln", "deepnorm", "gpas", "layernorm_scaling", "rezero"])
@pytest.mark.parametrize("gone", range(LAYERS))
def test_d4_removal_keeps_the_constants_of_the_survivors(norm: str, gone: int, ids) -> None:
    model = build(norm)
    found = diagnose(model, ids, CONTEXT) if gone == 0 else None
    without = copy.deepcopy(model)
    layers = without.model.layers
    without.model.layers = nn.ModuleList([layer for number, layer in enumerate(layers) if number != gone])
    expected = perplexity(without, ids, CONTEXT)
    with removed(model.model.layers[gone]):
        measured = perplexity(model, ids, CONTEXT)
    assert measured.loss == pytest.approx(expected.loss, rel=1e-6)
    whole = perplexity(model, ids, CONTEXT)
    assert abs(expected.loss - whole.loss) > 1e-3, "a layer that changes nothing would prove nothing"
    if found is not None:
        assert found["loss"] == pytest.approx(whole.loss, rel=1e-6)
        assert found["removal_delta_loss"][0] == pytest.approx(expected.loss - whole.loss, rel=1e-4)
        assert found["removal_delta_perplexity"][0] == pytest.approx(
            expected.perplexity - whole.perplexity, rel=1e-4
        )


def test_d4_o5_removal_equals_folding_first_and_not_rebuilding(ids) -> None:
    """LayerNorm Scaling folded into a Llama, whose gains then hold 1/sqrt(l), and cut there."""
    model = build("layernorm_scaling")
    found = diagnose(model, ids, CONTEXT)
    for gone in range(LAYERS):
        folded: Any = fold_to_stock(model)
        folded.model.layers = nn.ModuleList([x for n, x in enumerate(folded.model.layers) if n != gone])
        folded.config.num_hidden_layers = LAYERS - 1
        assert found["removal_loss"][gone] == pytest.approx(perplexity(folded, ids, CONTEXT).loss, rel=1e-5)
    rebuilt = build("layernorm_scaling")
    rebuilt.model.layers = nn.ModuleList(list(rebuilt.model.layers)[1:])
    for depth, layer in enumerate(rebuilt.model.layers, start=1):
        layer.input_layernorm.scale = layer.post_attention_layernorm.scale = depth**-0.5
    assert abs(found["removal_loss"][0] - perplexity(rebuilt, ids, CONTEXT).loss) > 1e-3


def test_d7_gain_drift(ids) -> None:
    model = build("gpas")
    with torch.no_grad():
        norm = model.model.layers[1].input_layernorm
        norm.weight.fill_(1.0)
        norm.weight[:4] = torch.tensor([1.5, 0.5, 1.25, 1.0])
        model.model.layers[1].post_attention_layernorm.weight.fill_(1.0)
    found = diagnose(model, ids, CONTEXT, removal=False)
    gains = {gain["name"]: gain for gain in found["gains"]}
    moved = gains["model.layers.1.input_layernorm.weight"]
    assert moved["drift"] == pytest.approx(math.sqrt((0.25 + 0.25 + 0.0625) / 16), rel=1e-6)
    assert (moved["unchanged"], moved["layer"], moved["initial"]) == (13 / 16, 2, 1.0)
    assert found["gain_drift"][1] == pytest.approx(math.sqrt((0.25 + 0.25 + 0.0625) / 32), rel=1e-6)
    gate = gains["model.layers.0.attention_sum.gate"]
    assert gate["drift"] == pytest.approx(0.7) and gate["initial"] == 0.0
    assert gains["model.norm.weight"]["layer"] == 0


def test_d7_scalenorm_drifts_from_its_own_initial_value() -> None:
    config = LlmNormConfig(**{**SIZES, "norm": "scalenorm", "num_hidden_layers": 1})
    model = LlmNormForCausalLM(config)
    assert [drift(gain) for gain in find_gains(model, find_blocks(model))] == [0.0, 0.0, 0.0]


def test_d9_massive_activations_are_found_where_they_are() -> None:
    """The threshold of arXiv 2402.17762: above 100 and at least 1,000 medians of that sequence."""
    x = torch.full((2, 5, 8), 0.01)
    x[1] = 0.15
    x[0, 0, 3], x[1, 4, 1] = -400.0, 200.0
    x[0, 1, 1] = 99.0  # 9,900 medians and too small
    x[1, 2, 7] = 101.0  # 673 medians

    class Same(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    block = Same()
    statistics = StreamStatistics(1, torch.device("cpu"))
    with statistics.watching([block]):
        block(x)
        block(x)
    found = statistics.result()
    assert found["massive_count"] == [4, 4] and found["max_activation"] == [400.0, 400.0]
    assert found["massive_ratio"] == pytest.approx([40000.0, 40000.0])
    places = {
        (one["sequence"], one["position"], one["feature"], one["value"])
        for one in found["massive_positions"][0]
    }
    assert places == {(0, 0, 3, -400.0), (1, 4, 1, 200.0), (2, 0, 3, -400.0), (3, 4, 1, 200.0)}


def test_the_batch_size_changes_nothing_and_the_model_comes_back(ids) -> None:
    model = build("mix_ln").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    one = diagnose(model, ids, CONTEXT, batch_size=1, gradient_batches=1)
    many = diagnose(model, ids, CONTEXT, batch_size=7, gradient_batches=1)
    for key, value in one.items():
        if "gradient" not in key and key != "gains":
            torch.testing.assert_close(*map(_numbers, (value, many[key])), rtol=2e-5, atol=1e-6, msg=key)
    assert model.training and all(
        torch.equal(model.state_dict()[name], value) for name, value in before.items()
    )
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    assert json.loads(json.dumps(one, allow_nan=False)) == one


def _numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return [_numbers(item) for item in value.values()]
    return [_numbers(item) for item in value] if isinstance(value, list) else value


def test_a_stock_model_and_a_bf16_one(ids) -> None:
    """Another library's Llama with our weights, and its bf16 copy, which is measured in fp32."""
    model = build()
    stock = LlamaForCausalLM(LlamaConfig(**SIZES))
    stock.load_state_dict(model.state_dict())
    ours, theirs = diagnose(model, ids, CONTEXT), diagnose(stock, ids, CONTEXT)
    for key in (
        "stream_variance",
        "block_influence",
        "attention_entropy",
        "removal_loss",
        "gradient_norm",
        "gain_drift",
    ):
        assert theirs[key] == pytest.approx(ours[key], rel=1e-4), key
    half = diagnose(stock.bfloat16(), ids, CONTEXT, removal=False)
    assert next(stock.parameters()).dtype == torch.bfloat16
    assert half["stream_variance"] == pytest.approx(ours["stream_variance"], rel=0.02)


@pytest.mark.parametrize(
    ("length", "options", "message"),
    [
        (CONTEXT, {}, f"holds {CONTEXT} tokens, fewer than one window of context_length={CONTEXT}"),
        (200, {"context_length": 65}, "context_length=65 exceeds the model's max_position_embeddings=64"),
        (200, {"context_length": 0}, "context_length=0 must be at least 1"),
        (200, {"gradient_batches": 0}, "gradient_batches=0 must be at least 1"),
    ],
)
def test_what_cannot_be_measured_is_refused(length: int, options: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        diagnose(build(), np.zeros(length, dtype=np.int64), **{"context_length": CONTEXT, **options})


def test_a_token_beyond_the_vocabulary_is_refused() -> None:
    with pytest.raises(UserError, match=f"token ids from 0 to {VOCAB_SIZE} and the model a vocabulary"):
        diagnose(build(), [0, VOCAB_SIZE] * CONTEXT, CONTEXT)
