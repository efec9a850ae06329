"""The model section: a size preset and every key of the model's own configuration."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from llmnorm.config.base import PositiveInt, Section
from llmnorm.config.presets import ARCHITECTURES, PRESETS
from llmnorm.errors import UserError

NormName = Literal[
    "pre_ln",
    "post_ln",
    "mix_ln",
    "layernorm_scaling",
    "pre_rmsnorm",
    "pre_crmsnorm",
    "post_rmsnorm",
    "deepnorm",
    "sandwich",
    "peri_ln",
    "reordered",
    "skipinit",
    "rezero",
    "layerscale",
    "qk_norm",
    "hybrid_norm",
    "scalenorm",
    "dyt",
    "ngpt",
    "gpas",
    "powernorm",
    "unified_norm",
    "prepbn",
    "convex",
    "none",
]
PluginName = Annotated[str, Field(pattern=r"\.py:\w+$")]
InitName = Literal[
    "hf_llama",
    "scaled",
    "depth_scaled",
    "mitchell",
    "small_init",
    "scaled_embed",
    "scaled_and_embed",
    "megatron_head",
    "orthogonal",
]
AttentionName = Literal["softmax", "nalaformer", "sla"]
PresetName = Literal["2m", "9m", "20m", "60m", "71m", "130m", "250m", "350m", "1b", "3b", "7b"]
VOCABULARY_MULTIPLE = 64  # 128 bytes in bf16: full-speed tensor-core tiles for the output layer


class MupSection(Section):
    """muP: the widths at which hyper-parameters were tuned."""

    base_hidden_size: PositiveInt = Field(256, description="Width at which learning rates were tuned.")
    base_head_dim: PositiveInt = Field(
        64, description="Head width at which attention scores have their usual scale."
    )


class QuantizationSection(Section):
    """4-bit training (Stable-SPAM, arXiv 2502.17055): 4-bit operands forward, straight-through gradients."""

    weights: Literal["int4", "fp4", "none"] = Field("int4", description="Format of the weights.")
    activations: Literal["int4", "fp4", "none"] = Field(
        "int4", description="Format of the activations, kept in it for the backward pass."
    )
    group_size: Annotated[int, Field(ge=4, le=256)] | None = Field(
        None, description="Numbers that share a scale; must divide every input size. null: 128, released 256."
    )
    parity: Literal["released"] | None = Field(
        None, description="released: the authors' grids and groups through the flattened tensor."
    )
    rounding: Literal["nearest", "stochastic"] = Field(
        "nearest",
        description="Of both operands in training; evaluation and exports round to the nearest level.",
    )


ConstraintName = Literal[
    "spectral_cap",
    "spectral_soft_cap",
    "spectral_normalize",
    "spectral_hammer",
    "spectral_weight_decay",
    "stiefel",
    "normalize_and_project",
    "none",
]


class WeightConstraintSection(Section):
    """What the weights obey after every update (arXiv 2507.13338), whatever the optimizer."""

    name: ConstraintName = Field(description="The rule of the hidden matrices. See docs/lipschitz.md.")
    max_norm: Annotated[float, Field(gt=0.0)] | None = Field(
        None,
        description="Largest singular value over sqrt(out/in); null: 1. Not of spectral_weight_decay.",
    )
    method: Literal["exact", "polynomial"] | None = Field(
        None,
        description="Of spectral_cap: exact leaves smaller singular values alone; polynomial is faster and "
        "shrinks them by 6 %. null: exact.",
    )
    decay: Annotated[float, Field(gt=0.0)] | None = Field(
        None, description="Of spectral_weight_decay: decay of the largest singular value; null: 0.1."
    )
    embedding_max_rms: Annotated[float, Field(gt=0.0)] | None = Field(
        None, description="Largest RMS of a row of the embedding; null: 1."
    )
    head_max_rms: Annotated[float, Field(gt=0.0)] | None = Field(
        None, description="Largest RMS of a row of the output layer; null: 1."
    )


class WeightParametrizationSection(Section):
    """What function of its stored matrix a projection multiplies with. See docs/lipschitz.md."""

    name: Literal[
        "spectral_norm",
        "sigma_reparam",
        "weight_norm",
        "weight_conditioning",
        "weight_standardization",
        "spectral_conditioning",
    ] = Field(description="Which function.")
    modules: (
        list[Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]] | None
    ) = Field(
        None,
        description="The projections that it treats; null: all, of spectral_conditioning q_proj, k_proj and "
        "v_proj.",
    )
    method: Literal["exact", "power"] | None = Field(
        None,
        description="Of spectral_norm and sigma_reparam, for the largest singular value: exact (an "
        "eigendecomposition after each update) or power (power iteration, may be too small). null: exact.",
    )
    iterations: PositiveInt | None = Field(
        None, description="Of method power: iterations after each update; null: 1."
    )
    scale: Annotated[float, Field(gt=0.0)] | None = Field(
        None, description="Of spectral_norm: the largest singular value; null: 1."
    )
    initial_gain: Annotated[float, Field(gt=0.0)] | None = Field(
        None, description="Of sigma_reparam: the learned largest singular value at first; null: 1."
    )
    scaled: bool | None = Field(
        None,
        description="Of weight_standardization: rows of a learned length, 1 at first (true), or of variance "
        "1 (false). null: true.",
    )
    shift: Annotated[float, Field(gt=0.0)] | None = Field(
        None, description="Of spectral_conditioning: what is added to the diagonal; null: 10, the paper's."
    )


class ModelSection(Section):
    """What is trained. `preset` fills in the sizes; every key given beside it wins."""

    preset: PresetName | None = Field(None, description="Size by name; null: give the sizes below.")
    paper_exact: bool = Field(
        False,
        description="Round nothing: the preset's published intermediate size and the tokenizer's own "
        "vocabulary size.",
    )
    architecture: Literal["llama", "lipschitz"] = Field(
        "llama",
        description="lipschitz: only parts with a finite Lipschitz constant, and defaults of the norm-free "
        "transformer of arXiv 2507.13338: norm convex, mlp plain, hidden_act gelu, init orthogonal, "
        "weight_constraint {name: spectral_cap}. See docs/lipschitz.md.",
    )
    norm: NormName | PluginName | list[NormName | PluginName] = Field(
        "pre_rmsnorm",
        description="Normalization and residual placement, or file.py:Class of a plugin; a list gives one "
        "per layer.",
    )
    norm_options: dict[str, Any] = Field(
        default_factory=dict,
        description="Options of the norm, for example {post_fraction: 0.25} or {num_post_layers: 3} for "
        "mix_ln, and {norm_type: layernorm | floor_rmsnorm} for every name that does not say its norm.",
    )
    attention: AttentionName | dict[str, Any] = Field(
        "softmax",
        description="Sequence mixing, of all layers or as a hybrid: {pattern: [nalaformer, softmax]}, which "
        "repeats, or {softmax_every: 4, linear: nalaformer}.",
    )
    attention_options: dict[str, Any] = Field(
        default_factory=dict,
        description="Options of the attention, for example {lambda: 3.0, floor: 0.1} for nalaformer and "
        "{gate: head} for softmax; of a hybrid by name, {nalaformer: {lambda: 3.0}}. See docs/attention.md.",
    )
    mlp: Literal["gated", "plain"] = Field(
        "gated", description="Feed-forward part: gated (LLaMA's, three matrices) or plain (two)."
    )
    mlp_options: dict[str, Any] = Field(
        default_factory=dict,
        description="Options of the MLP: {clip: 8.0} for gated, where gate and up are cut off; "
        "{unit_slope: false} for plain.",
    )
    final_scale: float = Field(1.0, gt=0.0, description="What multiplies the logits.")
    attn_implementation: Literal["sdpa", "eager", "flex_attention", "flash_attention_2"] = Field(
        "sdpa", description="Kernel that computes softmax attention."
    )
    init: InitName = Field("hf_llama", description="Initialization rule.")
    init_from: str | None = Field(
        None,
        description="Start from the weights in a folder or in hub:REPO: a stock Llama or a checkpoint "
        "of ours. Sizes are then theirs; use preset: null.",
    )
    mup: bool | MupSection | None = Field(
        None,
        description="muP: a learning rate tuned at base_hidden_size holds at every width. true: with the "
        "defaults of its keys.",
    )
    residual_dtype: Literal["fp32", "bf16"] | None = Field(
        None, description="Dtype of the residual stream; null: that of the embedding's output."
    )
    quantization: QuantizationSection | None = Field(
        None, description="4-bit operands of the seven projections of each layer; null: none."
    )
    weight_constraint: WeightConstraintSection | None = Field(
        None, description="Caps on the weights, kept after every update; null: none."
    )
    weight_parametrization: WeightParametrizationSection | list[WeightParametrizationSection] | None = Field(
        None,
        description="What function of their stored matrices the projections of the layers multiply with, for "
        "example {name: spectral_norm}; a list applies in turn. null: the matrices themselves.",
    )
    hidden_size: PositiveInt | None = Field(None, description="Width of the residual stream.")
    intermediate_size: PositiveInt | None = Field(None, description="Width inside the MLP.")
    num_hidden_layers: PositiveInt | None = Field(None, description="Number of blocks.")
    num_attention_heads: PositiveInt | None = Field(None, description="Query heads.")
    num_key_value_heads: PositiveInt | None = Field(
        None, description="Key and value heads; null: as many as query heads."
    )
    head_dim: PositiveInt | None = Field(
        None, description="Width of a head; null: hidden_size / num_attention_heads."
    )
    hidden_act: str = Field("silu", min_length=1, description="Activation of the MLP.")
    vocab_size: PositiveInt | None = Field(
        None,
        description="Rows of the embedding; null: the tokenizer's size rounded up to a multiple of "
        f"{VOCABULARY_MULTIPLE}.",
    )
    max_position_embeddings: PositiveInt | None = Field(
        None,
        description="Longest context the model declares; null: the larger of 2048 and data.sequence_length.",
    )
    tie_word_embeddings: bool = Field(False, description="Use the embedding matrix as the output layer.")
    rms_norm_eps: float = Field(1e-6, gt=0.0, description="Added to the mean square inside every norm.")
    rope_theta: float = Field(10000.0, gt=0.0, description="Base of the rotary position embedding.")
    rope_parameters: dict[str, Any] | None = Field(
        None,
        description="Full rotary parameters as Hugging Face writes them (rope_type, factor, ...); "
        "null: plain rotary.",
    )
    attention_bias: bool = Field(False, description="Biases on the q, k, v and o projections.")
    mlp_bias: bool = Field(False, description="Biases on the gate, up and down projections.")
    initializer_range: float = Field(
        0.02, gt=0.0, description="Standard deviation that the init rule starts from."
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_in_preset(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        architecture = values.get("architecture")
        defaults = ARCHITECTURES.get(architecture, {}) if isinstance(architecture, str) else {}
        values = {**defaults, **values}
        name = values.get("preset")
        preset = PRESETS.get(name) if isinstance(name, str) else None
        if preset is None:
            return values
        given = {key: value for key, value in values.items() if value is not None}
        return {**values, **preset.sizes(values.get("paper_exact") is True), **given}

    def arguments(self, tokenizer_size: int | None, sequence_length: int) -> dict[str, Any]:
        """Keyword arguments of `LlmNormConfig`, all but the special token ids.

        `tokenizer_size` is the number of the tokenizer's ids, None when there is no tokenizer at hand; then
        vocab_size must be given. Ids from true_vocab_size on are padding rows of the embedding.
        """
        if self.vocab_size is None and tokenizer_size is None:
            raise UserError(
                "model.vocab_size is null and the tokenizer that would set it is not at hand; give "
                "model.vocab_size, for example --model.vocab_size 32000"
            )
        rows = (
            self.vocab_size if self.vocab_size is not None else self._rounded_vocabulary(tokenizer_size or 0)
        )
        given = self.model_dump(exclude={"preset", "paper_exact", "init_from", "rope_theta"})
        given["vocab_size"] = rows
        given["norm"] = self.norm_names()
        given["true_vocab_size"] = None if tokenizer_size is None else min(tokenizer_size, rows)
        if self.max_position_embeddings is None:
            given["max_position_embeddings"] = max(2048, sequence_length)
        given["rope_parameters"] = {
            "rope_type": "default",
            "rope_theta": self.rope_theta,
            **(self.rope_parameters or {}),
        }
        return given

    def norm_names(self) -> str | list[str]:
        """`norm` as a model's config has it: a plugin's file without its folder, as it travels."""
        if isinstance(self.norm, list):
            return [norm.rpartition("/")[2] for norm in self.norm]
        return self.norm.rpartition("/")[2]

    def _rounded_vocabulary(self, tokenizer_size: int) -> int:
        multiple = 1 if self.paper_exact else VOCABULARY_MULTIPLE
        return -(-tokenizer_size // multiple) * multiple
