"""Initial values: the standard deviations of each rule; order, device, dtype and sharding do not matter."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from llmnorm.modeling import INIT_RULES, LlmNormConfig, LlmNormForCausalLM, initialize_weights
from llmnorm.modeling.initialization import parameter_rule

ConfigMaker = Callable[..., LlmNormConfig]

# Large enough that a standard deviation is known to 1 %: at least 2^15 numbers in every matrix.
WIDE: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 320,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
D, F, L = 256, 320, 3
CUT = 0.98658  # standard deviation of N(0, 1) cut at 3

LLAMA = dict.fromkeys(("embedding", "lm_head", "attention_in", "attention_out", "mlp_in", "mlp_out"), 0.02)
# init -> role -> standard deviation in layer l (1 to L).
EXPECTED: dict[str, Callable[[int], dict[str, float]]] = {
    "hf_llama": lambda depth: LLAMA,
    "scaled": lambda depth: {
        **LLAMA,
        "attention_out": 0.02 / math.sqrt(2 * L),
        "mlp_out": 0.02 / math.sqrt(2 * L),
    },
    "depth_scaled": lambda depth: {
        **LLAMA,
        "attention_out": 0.02 / math.sqrt(2 * depth),
        "mlp_out": 0.02 / math.sqrt(2 * depth),
    },
    "mitchell": lambda depth: {
        **dict.fromkeys(LLAMA, CUT / math.sqrt(D)),
        "attention_out": CUT / math.sqrt(2 * D * depth),
        "mlp_out": CUT / math.sqrt(2 * F * depth),
    },
    "small_init": lambda depth: {
        **LLAMA,
        "attention_in": math.sqrt(2 / (5 * D)),
        "attention_out": math.sqrt(2 / (5 * D)),
    },
    "scaled_embed": lambda depth: {**LLAMA, "embedding": math.sqrt(2 / 5)},
    "scaled_and_embed": lambda depth: {
        **LLAMA,
        "embedding": math.sqrt(2 / 5),
        "attention_out": 0.02 / math.sqrt(2 * L),
        "mlp_out": 0.02 / math.sqrt(2 * L),
    },
    "megatron_head": lambda depth: {**LLAMA, "lm_head": CUT / math.sqrt(D)},
}
assert {*EXPECTED, "orthogonal"} == set(INIT_RULES)  # of which see test_lipschitz.py


def _matrices(model: LlmNormForCausalLM, depth: int) -> list[tuple[str, Tensor]]:
    layer = model.model.layers[depth - 1]
    return [
        ("embedding", model.model.embed_tokens.weight),
        ("lm_head", model.lm_head.weight),
        *(("attention_in", getattr(layer.self_attn, f"{p}_proj").weight) for p in "qkv"),
        ("attention_out", layer.self_attn.o_proj.weight),
        ("mlp_in", layer.mlp.gate_proj.weight),
        ("mlp_in", layer.mlp.up_proj.weight),
        ("mlp_out", layer.mlp.down_proj.weight),
    ]


@pytest.mark.parametrize("drawn_by", ["seed", "transformers"])
@pytest.mark.parametrize("init", EXPECTED)
def test_standard_deviations(init: str, drawn_by: str) -> None:
    torch.manual_seed(0)
    model = LlmNormForCausalLM(LlmNormConfig(**WIDE, init=init, norm="pre_ln", attention_bias=True))
    if drawn_by == "seed":
        initialize_weights(model, seed=0)
    for depth in range(1, L + 1):
        for role, weight in _matrices(model, depth):
            std = EXPECTED[init](depth)[role]
            # 4 standard errors of a sample's standard deviation, std / sqrt(2n), and the mean's, std /
            # sqrt(n).
            error = 4 / math.sqrt(weight.numel())
            assert weight.std().item() == pytest.approx(std, rel=error / math.sqrt(2)), (depth, role)
            assert abs(weight.mean().item()) < error * std
            if std in (CUT / math.sqrt(D), CUT / math.sqrt(2 * D * depth), CUT / math.sqrt(2 * F * depth)):
                assert weight.abs().max().item() <= 3 * std / CUT
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all()
        elif parameter.dim() == 1:
            assert (parameter == 1).all()


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def _assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert list(a) == list(b)
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("tied", [False, True])
def test_o15_meta_then_initialized_equals_eager(
    make_config: ConfigMaker, tokens: Tensor, tied: bool, row: dict[str, Any]
) -> None:
    config = make_config(**{"init": "scaled", **row}, tie_word_embeddings=tied)
    eager = LlmNormForCausalLM(config)
    initialize_weights(eager, seed=3)
    with torch.device("meta"):
        late = LlmNormForCausalLM(config)
    late.to_empty(device="cpu")
    for buffer in late.buffers():
        buffer.fill_(float("nan") if buffer.is_floating_point() else -1)
    initialize_weights(late, seed=3)
    _assert_same(_weights(eager), _weights(late))
    for (name, a), (_, b) in zip(eager.named_buffers(), late.named_buffers(), strict=True):
        assert torch.equal(a, b), name
    assert (late.lm_head.weight is late.model.embed_tokens.weight) == tied
    assert torch.equal(eager(tokens).logits, late(tokens).logits)


def test_yarn_frequencies_survive_the_meta_device(make_config: ConfigMaker) -> None:
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    config = make_config(rope_parameters=rope)
    eager = LlmNormForCausalLM(config)
    with torch.device("meta"):
        late = LlmNormForCausalLM(config)
    late.to_empty(device="cpu")
    initialize_weights(late, seed=0)
    assert torch.equal(eager.model.rotary_emb.inv_freq, late.model.rotary_emb.inv_freq)
    assert eager.model.rotary_emb.attention_scaling == late.model.rotary_emb.attention_scaling != 1.0


def test_depends_on_seed_and_name_alone(make_config: ConfigMaker) -> None:
    model = LlmNormForCausalLM(make_config())
    torch.manual_seed(0)
    initialize_weights(model, seed=0)
    first = _weights(model)
    torch.manual_seed(99)
    torch.randn(7)
    initialize_weights(model, seed=0)
    _assert_same(first, _weights(model))

    initialize_weights(model, seed=1)
    other = _weights(model)
    for name in first:
        assert torch.equal(first[name], other[name]) == ("norm" in name), name
    layers = [first[f"model.layers.{i}.self_attn.q_proj.weight"] for i in range(3)]
    assert not torch.equal(layers[0], layers[1])
    assert not torch.equal(
        first["model.layers.0.mlp.gate_proj.weight"], first["model.layers.0.mlp.up_proj.weight"]
    )

    # A deeper model draws its first layers alike: no parameter depends on what was drawn before it.
    deeper = LlmNormForCausalLM(make_config(num_hidden_layers=5))
    initialize_weights(deeper, seed=0)
    for name, value in first.items():
        assert torch.equal(deeper.state_dict()[name], value), name


def test_bf16_weights_are_the_rounded_fp32_ones(make_config: ConfigMaker) -> None:
    wide, narrow = LlmNormForCausalLM(make_config()), LlmNormForCausalLM(make_config()).bfloat16()
    initialize_weights(wide, seed=0)
    initialize_weights(narrow, seed=0)
    _assert_same({name: value.bfloat16() for name, value in _weights(wide).items()}, _weights(narrow))


def test_drawing_leaves_the_global_generator_alone(make_config: ConfigMaker) -> None:
    model = LlmNormForCausalLM(make_config())
    before = torch.get_rng_state()
    initialize_weights(model, seed=0)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(("pad", "zero"), [(0, True), (None, False), (1, False), (2, False)])
def test_padding_row(make_config: ConfigMaker, pad: int | None, zero: bool) -> None:
    """The padding row is 0 and untrained, unless the padding token also begins or ends documents (1, 2)."""
    model = LlmNormForCausalLM(make_config(pad_token_id=pad))
    for _ in range(2):
        rows = (model.model.embed_tokens.weight == 0).all(dim=1).nonzero().flatten().tolist()
        assert rows == ([0] if zero else [])
        initialize_weights(model, seed=0)
    batch = torch.tensor([[0, 1, 2, 3, 4]])
    model(batch, labels=batch).loss.backward()
    gradient = model.model.embed_tokens.weight.grad
    assert (gradient[:4].abs().sum(dim=1) > 0).tolist() == [not zero, True, True, True]


def test_a_parameter_without_a_rule_is_refused(make_config: ConfigMaker) -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Parameter(torch.ones(()))

    with pytest.raises(TypeError, match=r"Gate\.gate has no initial value"):
        parameter_rule(Gate(), "gate", make_config())
    model = LlmNormForCausalLM(make_config())
    model.model.layers[0].mlp.gate = Gate()
    with pytest.raises(TypeError, match=r"Gate\.gate has no initial value"):
        initialize_weights(model, seed=0)


def test_transformers_init_gives_every_norm_its_own_values(
    make_config: ConfigMaker, row: dict[str, Any]
) -> None:
    """Its default sets the weight of whatever is called a norm to 1, which would erase gains and steps."""
    config = make_config(**row)
    by_transformers, by_seed = LlmNormForCausalLM(config), LlmNormForCausalLM(config)
    initialize_weights(by_seed, seed=0)
    mine = dict(by_seed.named_parameters())
    vectors = [(name, p) for name, p in by_transformers.named_parameters() if p.dim() == 1]
    assert vectors or row["norm"] in ("none", "convex")
    for name, parameter in vectors:
        assert torch.equal(parameter, mine[name]), name


def test_transformers_init_keeps_loaded_weights(make_config: ConfigMaker, tmp_path: Path) -> None:
    """A checkpoint that lacks one matrix: that one is drawn by the rule, the others stay as loaded."""
    model = LlmNormForCausalLM(make_config(init="scaled_embed", pad_token_id=0))
    state = {name: torch.full_like(value, 0.5) for name, value in model.state_dict().items()}
    del state["model.embed_tokens.weight"], state["model.layers.1.mlp.down_proj.weight"]
    kept = set(state)
    model.save_pretrained(tmp_path, state_dict=state)
    loaded = LlmNormForCausalLM.from_pretrained(tmp_path)
    for name, value in loaded.state_dict().items():
        assert (value == 0.5).all() == (name in kept), name
    assert loaded.model.embed_tokens.weight[1:].std().item() == pytest.approx(math.sqrt(0.4), rel=0.1)
    assert (loaded.model.embed_tokens.weight[0] == 0).all()
    assert loaded.model.layers[1].mlp.down_proj.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_embedding_that_is_resized(make_config: ConfigMaker) -> None:
    model = LlmNormForCausalLM(make_config(true_vocab_size=50))
    assert model.generation_config.suppress_tokens == list(range(50, 61))
    model.resize_token_embeddings(70, mean_resizing=False)
    assert model.model.embed_tokens.weight[61:].std().item() == pytest.approx(0.02, rel=0.2)
    assert model.config.vocab_size == 70
    assert model.config.true_vocab_size is None
    assert model.generation_config.suppress_tokens is None


def _initialize_sharded(rank: int, world_size: int, folder: str, configs: list[dict[str, Any]]) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    mesh = init_device_mesh("cpu", (world_size,))
    for i, config in enumerate(configs):
        with torch.device("meta"):
            model = LlmNormForCausalLM(LlmNormConfig(**config))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        model.to_empty(device="cpu")
        initialize_weights(model, seed=5)
        whole = torch.load(f"{folder}/whole_{i}.pt", weights_only=True)
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter.full_tensor(), whole[name]), name
        logits = model(torch.arange(12)[None], use_cache=False).logits
        torch.testing.assert_close(logits, whole["logits"])
    dist.destroy_process_group()


@pytest.mark.distributed
def test_sharded_over_two_processes(make_config: ConfigMaker, tmp_path: Path) -> None:
    """Meta, sharded, emptied, initialized: the weights of one process. 61 rows make unequal shards."""
    configs = [
        make_config(tie_word_embeddings=tied, norm="mix_ln", init="mitchell", pad_token_id=0)
        for tied in (False, True)
    ]
    for i, config in enumerate(configs):
        model = LlmNormForCausalLM(config)
        initialize_weights(model, seed=5)
        logits = model(torch.arange(12)[None], use_cache=False).logits.detach()
        torch.save({**_weights(model), "logits": logits}, tmp_path / f"whole_{i}.pt")
    mp.spawn(_initialize_sharded, args=(2, str(tmp_path), [config.to_dict() for config in configs]), nprocs=2)
