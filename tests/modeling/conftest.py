"""Tiny models for the modeling tests: 3 layers, hidden 32, 4 heads over 2 key-value heads, 61 tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from llmnorm.modeling import PRESETS, LlmNormConfig, LlmNormForCausalLM, initialize_weights
from llmnorm.modeling.batch_statistics import batch_norms

SIZE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}

# Every norm, with the options that change its shape; a test that takes `row` runs for each.
ROWS: dict[str, dict[str, Any]] = {
    "pre_ln": {"norm": "pre_ln"},
    "pre_rmsnorm": {"norm": "pre_rmsnorm"},
    "pre_rmsnorm-recentered": {"norm": "pre_rmsnorm", "norm_options": {"recentered": True}},
    "pre_crmsnorm": {"norm": "pre_crmsnorm"},
    "pre_crmsnorm-head_bias": {"norm": "pre_crmsnorm", "norm_options": {"head_bias": True}},
    "post_ln": {"norm": "post_ln"},
    "post_rmsnorm": {"norm": "post_rmsnorm"},
    "post_rmsnorm-no_final": {"norm": "post_rmsnorm", "norm_options": {"final_norm": False}},
    "mix_ln": {"norm": "mix_ln", "norm_options": {"num_post_layers": 1}},
    "mix_ln-layernorm": {
        "norm": "mix_ln",
        "norm_options": {"num_post_layers": 2, "norm_type": "layernorm"},
    },
    "layernorm_scaling": {"norm": "layernorm_scaling"},
    "layernorm_scaling-layernorm": {"norm": "layernorm_scaling", "norm_options": {"norm_type": "layernorm"}},
    "deepnorm": {"norm": "deepnorm", "init": "hf_llama"},  # it draws the matrices that other inits would
    "sandwich": {"norm": "sandwich"},
    "peri_ln": {"norm": "peri_ln", "norm_options": {"embedding_norm": True}},
    "reordered": {"norm": "reordered"},
    "reordered-layernorm": {"norm": "reordered", "norm_options": {"norm_type": "layernorm"}},
    "skipinit": {"norm": "skipinit"},
    "rezero": {"norm": "rezero"},
    "layerscale": {"norm": "layerscale"},
    "qk_norm": {"norm": "qk_norm"},
    "qk_norm-layernorm": {"norm": "qk_norm", "norm_options": {"norm_type": "layernorm"}},
    "hybrid_norm": {"norm": "hybrid_norm", "norm_options": {"first_layer": "pre"}},
    "scalenorm": {"norm": "scalenorm"},
    "scalenorm-fixnorm": {"norm": "scalenorm", "norm_options": {"fixnorm": True}},
    "dyt": {"norm": "dyt"},
    "ngpt": {"norm": "ngpt"},
    "gpas": {"norm": "gpas"},
    "gpas-post": {"norm": "gpas", "norm_options": {"base": "post"}},
    "gpas-deepnorm": {"norm": "gpas", "norm_options": {"base": "deepnorm"}, "init": "hf_llama"},
    "gpas-mix_ln": {"norm": "gpas", "norm_options": {"base": "mix_ln", "num_post_layers": 1}},
    "powernorm": {"norm": "powernorm"},
    "unified_norm": {"norm": "unified_norm"},
    "prepbn": {"norm": "prepbn", "norm_options": {"hold_steps": 2, "interpolation_steps": 10}},
    "convex": {"norm": "convex"},
    "convex-floor": {
        "norm": "convex",
        "norm_options": {"norm_in": "floor_rmsnorm", "qk_norm": "floor_rmsnorm", "floor": 0.1},
    },
    "qk_norm-floor": {"norm": "qk_norm", "norm_options": {"norm_type": "floor_rmsnorm", "floor": 0.1}},
    "none": {"norm": "none", "norm_options": {"own_init": False}},
    "list": {"norm": ["post_rmsnorm", "pre_ln", "layernorm_scaling"]},
}
assert {row["norm"] for row in ROWS.values() if isinstance(row["norm"], str)} == set(PRESETS)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "row" in metafunc.fixturenames:
        metafunc.parametrize("row", list(ROWS.values()), ids=list(ROWS))


@pytest.fixture
def size() -> dict[str, Any]:
    return dict(SIZE)


@pytest.fixture
def make_config() -> Callable[..., LlmNormConfig]:
    return lambda **changes: LlmNormConfig(**{**SIZE, **changes})


@pytest.fixture
def make_model(make_config: Callable[..., LlmNormConfig]) -> Callable[..., LlmNormForCausalLM]:
    """A model with weights drawn from seed 0, gains, shifts and running statistics off their first values."""

    def make(*, plain: bool = False, **changes: Any) -> LlmNormForCausalLM:
        model = LlmNormForCausalLM(make_config(**changes))
        initialize_weights(model, seed=0)
        if not plain:
            generator = torch.Generator().manual_seed(1)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.dim() == 1:
                        parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
                    else:
                        parameter.mul_(5)  # so that attention is far from uniform
                for norm in batch_norms(model):
                    norm.updates.fill_(7)
                    for name in norm.initial_statistics:
                        statistic = getattr(norm, name)
                        statistic.add_(0.2 * torch.rand(statistic.shape, generator=generator))
        return model.eval()

    return make


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, SIZE["vocab_size"], (2, 12), generator=torch.Generator().manual_seed(2))
