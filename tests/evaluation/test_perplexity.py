"""Perplexity against a naive reference, and everything that must not change it."""

from __future__ import annotations

import math
import multiprocessing
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing
from torch import distributed
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from llmnorm.errors import UserError
from llmnorm.evaluation import (
    PerplexityResult,
    evaluation_metrics,
    held_out_numbers,
    perplexity,
    windows,
)

# The fork server imports these once; both processes are forked from it.
multiprocessing.set_forkserver_preload(
    ["llmnorm.evaluation", "torch.distributed.fsdp", "transformers.models.llama.modeling_llama"]
)

ROUNDING = 1e-6  # fp32 matrix products of different shapes round differently; sums are fp64


@torch.no_grad()
def naive_nll(model: torch.nn.Module, ids: np.ndarray, context_length: int, stride: int) -> list[float]:
    """-ln p of every token but the first, one forward pass per token: its window is the first that reaches
    it.
    """
    losses = []
    for position in range(1, len(ids)):
        number = max(0, math.ceil((position - context_length) / stride))
        context = torch.tensor(ids[number * stride : position])[None]
        logits = model(input_ids=context).logits[0, -1]
        losses.append(float(F.cross_entropy(logits.double(), torch.tensor(int(ids[position])))))
    return losses


@pytest.mark.parametrize("stride", [None, 1, 5, 16])
def test_equals_a_forward_pass_per_token(
    llama: LlamaForCausalLM, stream: np.ndarray, stride: int | None
) -> None:
    ids = stream[:107]
    expected = naive_nll(llama, ids, 16, stride or 16)
    result = perplexity(llama, ids, context_length=16, stride=stride)
    assert result.tokens == len(expected) == 106
    assert result.nll_sum == pytest.approx(sum(expected), rel=ROUNDING)
    assert result.loss == pytest.approx(result.nll_sum / 106, rel=1e-12)
    assert result.perplexity == pytest.approx(math.exp(result.loss), rel=1e-12)
    assert (result.context_length, result.stride, result.dtype) == (16, stride, "float32")


@pytest.mark.parametrize("stride", [None, 7])
def test_o17_the_batch_size_does_not_change_it(
    llama: LlamaForCausalLM, stream: np.ndarray, stride: int | None
) -> None:
    one, *others = (perplexity(llama, stream, 32, stride, batch_size) for batch_size in (1, 7, 64))
    for other in others:
        assert other.nll_sum == pytest.approx(one.nll_sum, rel=ROUNDING)
        assert other.tokens == one.tokens == len(stream) - 1


@pytest.mark.parametrize("num_tokens", [2, 16, 17, 18, 33, 50])
@pytest.mark.parametrize("stride", [1, 3, 15, 16])
def test_every_token_but_the_first_is_scored_once(num_tokens: int, stride: int) -> None:
    scored: list[int] = []
    for window in windows(num_tokens, 16, stride):
        assert 1 <= window.scored <= window.stop - window.start <= 16
        scored.extend(range(window.stop - window.scored + 1, window.stop + 1))
    assert scored == list(range(1, num_tokens))


def test_our_model_and_the_llama_of_the_same_weights_agree(
    llama: LlamaForCausalLM, stream: np.ndarray
) -> None:
    from llmnorm.modeling import LlmNormConfig, LlmNormForCausalLM

    config = LlmNormConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    ours = LlmNormForCausalLM(config)
    ours.load_state_dict(llama.state_dict())
    for stride in (None, 9):
        expected = perplexity(llama, stream, 48, stride)
        assert perplexity(ours, stream, 48, stride).nll_sum == pytest.approx(expected.nll_sum, rel=ROUNDING)


def test_without_a_stride_windows_are_disjoint_and_targets_shifted() -> None:
    assert [tuple(window) for window in windows(10, 4, 4)] == [(0, 4, 4), (4, 8, 4), (8, 9, 1)]


def test_max_tokens_scores_the_first_targets(llama: LlamaForCausalLM, stream: np.ndarray) -> None:
    cut = perplexity(llama, stream, 16, max_tokens=100)
    assert cut.tokens == 100
    assert cut.nll_sum == pytest.approx(perplexity(llama, stream[:101], 16).nll_sum, rel=1e-12)


def test_chunks_of_the_cross_entropy_add_up(
    llama: LlamaForCausalLM, stream: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = perplexity(llama, stream, 32)
    monkeypatch.setattr(sys.modules["llmnorm.evaluation.perplexity"], "LOGITS_PER_CHUNK", 97 * 5)
    assert perplexity(llama, stream, 32).nll_sum == pytest.approx(whole.nll_sum, rel=1e-12)


def test_the_model_comes_back_as_it_was(llama: LlamaForCausalLM, stream: np.ndarray) -> None:
    expected = perplexity(llama, stream, 32)
    try:
        llama.train()
        llama.model.layers[0].eval()
        with torch.autocast("cpu", torch.bfloat16):
            result = perplexity(llama, stream, 32)
            assert torch.is_autocast_enabled("cpu")
        assert result == expected  # fp32 in spite of the surrounding autocast, dropout off
        assert llama.training and not llama.model.layers[0].training and llama.model.layers[1].training
    finally:
        llama.eval()


def test_bf16_weights_are_measured_in_fp32(llama: LlamaForCausalLM, stream: np.ndarray) -> None:
    import copy

    rounded = copy.deepcopy(llama).bfloat16()
    upcast = copy.deepcopy(rounded).float()
    held = rounded.lm_head.weight
    result = perplexity(rounded, stream, 32)
    assert result == perplexity(upcast, stream, 32)
    assert rounded.lm_head.weight is held and held.dtype == torch.bfloat16
    native = perplexity(rounded, stream, 32, float32=False)
    assert native.dtype == "bfloat16"
    assert native.loss != result.loss and native.loss == pytest.approx(result.loss, rel=0.02)


def test_a_model_without_rotary_positions(stream: np.ndarray) -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_positions=32, n_embd=32, n_layer=1, n_head=2))
    expected = naive_nll(model.eval(), stream[:60], 16, 4)
    assert perplexity(model.train(), stream[:60], 16, 4).nll_sum == pytest.approx(sum(expected), rel=ROUNDING)
    with pytest.raises(UserError, match="context_length=64 exceeds the 32 positions"):
        perplexity(model, stream, 64)


def test_a_context_beyond_the_rotary_range_is_warned_about(
    llama: LlamaForCausalLM, stream: np.ndarray
) -> None:
    with pytest.warns(UserWarning, match="context_length=128 exceeds max_position_embeddings=64"):
        perplexity(llama, stream, 128)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        perplexity(llama, stream, 64)


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        ([5], {}, "at least 2 tokens"),
        ([5, 97], {}, "token id 97 is outside the model's vocabulary of 97"),
        ([5, -1, 5], {}, "token id -1 is outside"),
        ([[1, 2], [3, 4]], {}, "one stream of integers"),
        ([1.5, 2.5], {}, "one stream of integers"),
        (
            [1, 2, 3],
            {"stride": 17, "context_length": 16},
            "stride=17 must be between 1 and context_length=16",
        ),
        ([1, 2, 3], {"stride": 0}, "stride=0 must be between"),
        ([1, 2, 3], {"context_length": 0}, "context_length=0"),
        ([1, 2, 3], {"batch_size": 0}, "batch_size=0"),
    ],
)
def test_mistakes_are_named(llama: LlamaForCausalLM, ids: list, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        perplexity(llama, ids, **{"context_length": 16, **options})


def test_tensors_lists_and_batched_rows_are_the_same_stream(
    llama: LlamaForCausalLM, stream: np.ndarray
) -> None:
    ids = stream[:50]
    expected = perplexity(llama, ids, 16)
    assert perplexity(llama, ids.tolist(), 16) == expected
    assert perplexity(llama, torch.tensor(ids)[None], 16) == expected
    assert perplexity(llama, ids.astype(np.uint16), 16) == expected


def test_word_perplexity_and_bits_per_byte_by_hand() -> None:
    text = "naïve café"  # 2 words, 12 bytes
    result = PerplexityResult(
        nll_sum=12.0, tokens=3, loss=4.0, context_length=8, words=len(text.split()), bytes=len(text.encode())
    )
    assert result.word_perplexity == pytest.approx(math.exp(6.0))
    assert result.bits_per_byte == pytest.approx(12.0 / (12 * math.log(2)))
    assert result.to_dict()["perplexity"] == pytest.approx(math.exp(4.0))
    assert PerplexityResult(nll_sum=9e3, tokens=3, loss=3e3, context_length=8).to_dict()["perplexity"] is None


def test_several_sets_are_pooled_by_tokens() -> None:
    sets = {
        "a": PerplexityResult(nll_sum=10.0, tokens=10, loss=1.0, context_length=8),
        "b": PerplexityResult(nll_sum=90.0, tokens=30, loss=3.0, context_length=8),
    }
    row = evaluation_metrics(sets)
    assert (row["eval/loss"], row["eval/tokens"]) == (2.5, 40)
    assert (row["eval/a/loss"], row["eval/b/perplexity"]) == (1.0, pytest.approx(math.exp(3.0)))
    assert held_out_numbers(row)["all sets"]["loss"] == 2.5 and held_out_numbers(row)["a"]["tokens"] == 10
    single = evaluation_metrics({"validation": sets["b"]})
    assert held_out_numbers(single) == {"validation": {key[5:]: value for key, value in single.items()}}
    assert single == {"eval/loss": 3.0, "eval/perplexity": pytest.approx(math.exp(3.0)), "eval/tokens": 30}


def _share(
    rank: int, world_size: int, meeting: str, llama: LlamaForCausalLM, ids: np.ndarray, expected: list
) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world_size)
    try:
        for batch_size, stride, nll_sum in expected:
            result = perplexity(llama, ids, 32, stride, batch_size, rank=rank, world_size=world_size)
            assert result.nll_sum == pytest.approx(nll_sum, rel=ROUNDING)
            assert result.tokens == len(ids) - 1
        # bf16 under FSDP2 computes in bf16; the measurement gathers the fp32 shards instead.
        mesh = init_device_mesh("cpu", (world_size,))
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, cast_forward_inputs=False)
        whole = {parameter for parameter in llama.parameters() if parameter.ndim == 1}
        for unit in (*llama.model.layers, llama):
            fully_shard(unit, mesh=mesh, mp_policy=policy, ignored_params=whole)
        llama.train()
        for batch_size, stride, nll_sum in expected:
            result = perplexity(llama, ids, 32, stride, batch_size, rank=rank, world_size=world_size)
            assert result.nll_sum == pytest.approx(nll_sum, rel=ROUNDING)
        assert llama.training
    finally:
        distributed.destroy_process_group()


@pytest.mark.distributed
def test_two_processes_get_the_same_number(
    llama: LlamaForCausalLM, stream: np.ndarray, tmp_path: Path
) -> None:
    expected = [
        (batch_size, stride, perplexity(llama, stream, 32, stride, 8).nll_sum)
        for batch_size, stride in ((1, None), (7, None), (64, None), (4, 9))
    ]
    torch.multiprocessing.start_processes(
        _share, (2, str(tmp_path / "meeting"), llama, stream, expected), nprocs=2, start_method="forkserver"
    )
