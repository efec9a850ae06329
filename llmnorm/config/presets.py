"""Model sizes by name.

The sizes from 71m up are the `llama_*.json` of Mix-LN (arXiv 2412.13795) and LayerNorm Scaling
(arXiv 2502.05795), 60m is GaLore's (arXiv 2403.03507); 2m, 9m and 20m are small enough to train and compare
on a CPU. All have untied embeddings.

Papers chose intermediate sizes such as 5461, which no tensor core can tile. By default the sizes from 71m up
are rounded up to a multiple of 64 (128 bytes in bf16, the alignment at which the matrix products of an A100
or H100 run at full speed); `model.paper_exact: true` gives the published number instead.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Preset(NamedTuple):
    """The shape of a model: widths, depth and heads."""

    hidden_size: int
    intermediate_size: int
    published_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None  # None: one per attention head

    def sizes(self, paper_exact: bool = False) -> dict[str, int]:
        """The preset as `model` keys; `paper_exact` takes the published intermediate size."""
        sizes = self._asdict()
        published = sizes.pop("published_intermediate_size")
        if paper_exact:
            sizes["intermediate_size"] = published
        return {key: value for key, value in sizes.items() if value is not None}


PRESETS: dict[str, Preset] = {
    #              hidden  FFN    published  layers  heads  key-value heads
    "2m": Preset(128, 352, 352, 6, 4, 2),
    "9m": Preset(256, 688, 688, 8, 4, None),
    "20m": Preset(384, 1024, 1024, 8, 6, None),
    "60m": Preset(512, 1376, 1376, 8, 8, None),
    "71m": Preset(512, 1408, 1368, 12, 8, None),
    "130m": Preset(768, 2048, 2048, 12, 12, None),
    "250m": Preset(768, 2560, 2560, 24, 16, None),
    "350m": Preset(1024, 2752, 2736, 24, 16, None),
    "1b": Preset(2048, 5504, 5461, 24, 32, None),
    "3b": Preset(2560, 6848, 6848, 32, 32, None),
    "7b": Preset(4096, 11008, 11008, 32, 32, None),
}

# `model.architecture` -> values of `model` keys that are not given; those of the model's own config, and a
# constraint that bounds the weights.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "lipschitz": {
        "norm": "convex",
        "mlp": "plain",
        "hidden_act": "gelu",
        "init": "orthogonal",
        "weight_constraint": {"name": "spectral_cap", "max_norm": 1.0},
    },
}
