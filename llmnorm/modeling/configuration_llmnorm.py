"""`LlmNormConfig`: every choice that decides the function a model computes, checked when it is made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field, fields
from typing import Any, ClassVar

from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from .attention_plan import has_options, layer_attentions, settle_attention_options
from .initialization import INIT_RULES, NORM_RULES
from .lipschitz import ARCHITECTURE_ATTENTION, ARCHITECTURES, check_architecture
from .mlp import MLP_OPTIONS, check_mlp, settle_mlp_options
from .mup import attention_scale, check_mup, output_multiplier, settle_mup
from .options import nearest
from .quantization import check_groups, settle_quantization
from .recurrent_cache import NUMBER_OF_STATES
from .residual import PRESETS, residual_plan, settle_options
from .weight_constraint import check_weight_constraint, settle_weight_constraint
from .weight_parametrization import check_weight_parametrization, settle_weight_parametrization

# Keys that transformers itself hands to the constructor, from a saved config, `from_pretrained` or an old
# spelling.
BOOKKEEPING = {
    "attn_implementation",
    "auto_map",
    "experts_implementation",
    "model_type",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "quantization_config",
    "rope_scaling",
    "rope_theta",
    "torch_dtype",
}

# A key of Llama's that is not one of ours. Saved with a sentence in it wherever the function is not Llama's,
# it stops `LlamaForCausalLM.from_pretrained`, which would only warn about the model_type and then compute
# something else.
INTERLOCK = "pretraining_tp"

AUTO_MAP = {
    "AutoConfig": "configuration_llmnorm.LlmNormConfig",
    "AutoModel": "modeling_llmnorm.LlmNormModel",
    "AutoModelForCausalLM": "modeling_llmnorm.LlmNormForCausalLM",
}


def _integer(least: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= least


def _number(accepts: Callable[[float], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, (int, float)) and not isinstance(value, bool) and accepts(value)


def _optional(accepts: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or accepts(value)


POSITIVE = (_integer(1), "must be a positive integer")
MAPPING = (lambda value: isinstance(value, dict), "must be a mapping from option to value")
SWITCH = (lambda value: isinstance(value, bool), "must be true or false")

# Rules about one key alone: key -> (the test a value must pass, the test in words).
RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "vocab_size": POSITIVE,
    "hidden_size": POSITIVE,
    "intermediate_size": POSITIVE,
    "num_hidden_layers": POSITIVE,
    "num_attention_heads": POSITIVE,
    "num_key_value_heads": (_optional(_integer(1)), "must be null or a positive integer"),
    "head_dim": (_optional(_integer(1)), "must be null or a positive integer"),
    "max_position_embeddings": POSITIVE,
    "initializer_range": (_number(lambda v: v > 0), "must be a number above 0"),
    "rms_norm_eps": (_number(lambda v: v >= 0), "must be a number of at least 0"),
    "attention_dropout": (_number(lambda v: 0 <= v < 1), "must be a number in [0, 1)"),
    "use_cache": SWITCH,
    "tie_word_embeddings": SWITCH,
    "attention_bias": SWITCH,
    "mlp_bias": SWITCH,
    "pad_token_id": (_optional(_integer(0)), "must be null or an integer of at least 0"),
    "true_vocab_size": (_optional(_integer(1)), "must be null or a positive integer"),
    "norm_options": MAPPING,
    "attention_options": MAPPING,
    "mlp_options": MAPPING,
    "final_scale": (_number(lambda v: v > 0), "must be a number above 0"),
}

# Keys whose value is one of a few names.
CHOICES: dict[str, tuple[Any, ...]] = {
    "architecture": tuple(ARCHITECTURES),
    "mlp": tuple(MLP_OPTIONS),
    "hidden_act": tuple(ACT2FN),
    "init": tuple(INIT_RULES),
    "residual_dtype": (None, "fp32", "bf16"),
}

# rope_type -> the keys of `rope_parameters` it needs, and those it may have, beside rope_type and rope_theta.
ROPE_KEYS: dict[str, tuple[set[str], set[str]]] = {
    "default": (set(), set()),
    "linear": ({"factor"}, set()),
    "dynamic": ({"factor"}, set()),
    "yarn": (
        {"factor"},
        {
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        },
    ),
    "longrope": (
        {"short_factor", "long_factor"},
        {"factor", "attention_factor", "original_max_position_embeddings"},
    ),
    "llama3": (
        {"factor", "low_freq_factor", "high_freq_factor"},
        {"original_max_position_embeddings"},
    ),
}


class LlmNormConfig(PreTrainedConfig):
    """A LLaMA-style causal language model with a choice of normalization, residual topology and attention.

    Llama's keys have Llama's meanings and defaults. The others:

    norm: a name of `residual.PRESETS`, or a list with one name for each layer. Default pre_rmsnorm, which is
    Llama. norm_options: the options of that norm. Defaults and computed values are filled in, so that
    config.json says
        everything: the `post_fraction` of mix_ln becomes the integer `num_post_layers`.
    attention: softmax, nalaformer or sla, or a mapping for a hybrid; attention_options: their options. See
        `attention_plan.py`. Default softmax.
    init: a name of `initialization.INIT_RULES`. Default hf_llama.
    mlp: gated, which is Llama's, or plain, two matrices; mlp_options: their options. See `mlp.py`. Default
        gated.
    final_scale: what multiplies the logits. Default 1.
    architecture: llama, or lipschitz for a model that has a finite Lipschitz constant on bounded embeddings:
        parts that have none are refused, and `norm`, `mlp`, `hidden_act`, `init` and two options of softmax
        attention have the defaults of the norm-free transformer in `lipschitz.py`. Default llama.
    mup: true, or {base_hidden_size: 256, base_head_dim: 64}, for muP (see `mup.py`). null: the standard
        parametrization.
    residual_dtype: dtype of the residual stream. null follows the embedding's output, hence the dtype of the
        parameters: fp32 for fp32 parameters under bf16 autocast, bf16 for bf16 parameters. fp32 and bf16 fix
        it.
    quantization: 4-bit operands of the projections, {weights: int4 | fp4 | none, activations: int4 | fp4 |
        none, group_size: 128, parity: null | released}. See `quantization.py`. null: none.
    weight_constraint: {name: spectral_cap, max_norm: 1.0}, what the optimizer's side keeps the weights to;
        the function is the same without it. See `weight_constraint.py`. null: none.
    weight_parametrization: {name: spectral_norm}, or a list of such, what function of their stored matrices
        the projections of the layers multiply with. See `weight_parametrization.py`. null: themselves.
    true_vocab_size: size of the tokenizer's vocabulary. The ids from there to vocab_size are padding rows,
        which `generate` never emits. null: all of vocab_size.

    rms_norm_eps is the epsilon of every norm, LayerNorm included. rope_theta may be given alone, as a short
    form of rope_parameters={"rope_type": "default", "rope_theta": ...}.

    Raises:
        ValueError: an unknown key, with the nearest known one, or a value that breaks a rule.
    """

    model_type: ClassVar[str] = "llmnorm"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    base_model_tp_plan: ClassVar[dict[str, Any] | None] = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = None  # type: ignore[assignment]  # null: num_attention_heads
    head_dim: int = None  # type: ignore[assignment]  # null: hidden_size / num_attention_heads
    hidden_act: str = None  # type: ignore[assignment]  # null: silu, or what `architecture` says
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    rope_parameters: dict[str, Any] = None  # type: ignore[assignment]  # null: default, theta 10000
    attention_bias: bool = False
    attention_dropout: float = 0.0
    mlp_bias: bool = False

    architecture: str = "llama"
    norm: str | list[str] = None  # type: ignore[assignment]  # null: pre_rmsnorm, or what `architecture` says
    norm_options: dict[str, Any] = field(default_factory=dict)
    attention: str | dict[str, Any] = "softmax"
    attention_options: dict[str, Any] = field(default_factory=dict)
    mlp: str = None  # type: ignore[assignment]  # null: gated, or what `architecture` says
    mlp_options: dict[str, Any] = field(default_factory=dict)
    final_scale: float = 1.0
    init: str = None  # type: ignore[assignment]  # null: hf_llama, or what `architecture` says
    residual_dtype: str | None = None
    quantization: dict[str, Any] | None = None
    true_vocab_size: int | None = None
    mup: dict[str, int] | None = None
    weight_constraint: dict[str, Any] | None = None
    weight_parametrization: list[dict[str, Any]] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs = self._known(kwargs)
        self._fill_in_architecture()
        self._check_each()
        self.mup = settle_mup(self.mup)
        self.quantization = settle_quantization(self.quantization)
        self.weight_constraint = settle_weight_constraint(self.weight_constraint)
        self.weight_parametrization = settle_weight_parametrization(self.weight_parametrization)
        self.norm_options = settle_options(self.norm, self.norm_options, self.num_hidden_layers)
        self.attention_options = settle_attention_options(
            self.attention, self.attention_options, self.num_hidden_layers
        )
        self.mlp_options = settle_mlp_options(self.mlp, self.mlp_options)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        self.rope_parameters = dict(self.rope_parameters or {})
        super().__post_init__(**kwargs)
        self.validate_architecture()

    def _known(self, extra: dict[str, Any]) -> dict[str, Any]:
        """The keys that are not fields, less those that only a saved file or a Llama config carries."""
        inherited = {f.name for f in fields(PreTrainedConfig)}
        own = [f.name for f in fields(type(self)) if f.name not in inherited] + ["rope_theta"]
        interlock = extra.pop(INTERLOCK, None)
        if interlock not in (None, 1) and not isinstance(interlock, str):
            raise ValueError(f"{INTERLOCK}={interlock!r} is not a key of LlmNormConfig; remove it")
        if extra.get("model_type", self.model_type) != self.model_type:
            raise ValueError(
                f"model_type={extra['model_type']!r} must be {self.model_type!r}; remove the key"
            )
        for key, value in extra.items():
            if key not in BOOKKEEPING and not key.startswith("_"):
                raise ValueError(f"{key}={value!r} is not a key of LlmNormConfig; {nearest(key, own)}")
        return extra

    def _fill_in_architecture(self) -> None:
        """Give keys without a value that of `architecture`."""
        name = self.architecture
        self._require(
            name in ARCHITECTURES, "architecture", f"is not a choice; {nearest(name, ARCHITECTURES)}"
        )
        for key, value in ARCHITECTURES[name].items():
            if getattr(self, key) is None:
                setattr(self, key, value)
        if self.attention == "softmax" and isinstance(self.attention_options, dict):
            self.attention_options = {**ARCHITECTURE_ATTENTION[name], **self.attention_options}

    def _require(self, holds: bool, key: str, rule: str) -> None:
        if not holds:
            raise ValueError(f"{key}={getattr(self, key)!r} {rule}")

    def _check_each(self) -> None:
        """The rules about one key alone."""
        for key, (accepts, rule) in RULES.items():
            self._require(accepts(getattr(self, key)), key, rule)
        for key, choices in CHOICES.items():
            value = getattr(self, key)
            self._require(value in choices, key, f"is not a choice; {nearest(value, map(str, choices))}")

    def validate_architecture(self) -> None:
        """The rules about keys that must fit each other. The model asks again, since a config can be edited.

        Raises:
            ValueError: naming the key, its value and the rule.
        """
        self._check_each()
        heads, vocab_size = self.num_attention_heads, self.vocab_size
        self._require(
            self.hidden_size % heads == 0,
            "num_attention_heads",
            f"must divide hidden_size={self.hidden_size}",
        )
        self._require(
            heads % self.num_key_value_heads == 0,
            "num_key_value_heads",
            f"must divide num_attention_heads={heads}",
        )
        self._require(
            self.head_dim % 2 == 0,
            "head_dim",
            f"must be even, as rotary positions turn pairs (hidden_size={self.hidden_size}, {heads} heads)",
        )
        self._require(
            self.true_vocab_size is None or self.true_vocab_size <= vocab_size,
            "true_vocab_size",
            f"must not exceed vocab_size={vocab_size}",
        )
        self._require(
            self.pad_token_id is None or self.pad_token_id < vocab_size,
            "pad_token_id",
            f"must be below vocab_size={vocab_size}",
        )
        self._require(
            self.init != "megatron_head" or not self.tie_word_embeddings,
            "init",
            "draws the output layer, which tie_word_embeddings=true removes; untie or choose another init",
        )
        self._check_own_init()
        check_mup(self)
        check_weight_constraint(self)
        check_weight_parametrization(self)
        self._check_quantization()
        self._check_rope()
        plan = residual_plan(self.norm, self.norm_options, self.num_hidden_layers)
        self._require(
            not plan.layers[0].on_sphere or set(self.layer_attentions) == {"softmax"},
            "attention",
            f"is not defined for norm={self.norm}, which puts the queries and keys of softmax on the unit "
            "sphere; use attention=softmax or another norm",
        )
        settle_attention_options(self.attention, self.attention_options, self.num_hidden_layers)
        check_mlp(self)
        check_architecture(self, plan)
        self._require(self.stream_width > 0, "hidden_size", f"must be at least 2 for norm={self.norm}")

    def _check_own_init(self) -> None:
        rows = [self.norm] if isinstance(self.norm, str) else self.norm
        bases = [self.norm_options["base"] if row == "gpas" else row for row in rows]
        for row in bases if self.norm_options.get("own_init") else ():
            self._require(
                not NORM_RULES.get(row, {}).keys() & INIT_RULES[self.init].keys(),
                "init",
                f"draws matrices that norm={row} draws by its own rule; use init=hf_llama, or "
                "norm_options.own_init=false to keep this init",
            )

    def _check_quantization(self) -> None:
        self._require(
            self.quantization is None or not self.is_compressed,
            "quantization",
            f"cannot treat the compressed stream of norm={self.norm}; choose another norm or no quantization",
        )
        check_groups(self)

    def _check_rope(self) -> None:
        rope = self.rope_parameters
        rope_type = rope.get("rope_type")
        if rope_type not in ROPE_KEYS:
            raise ValueError(
                f"rope_parameters.rope_type={rope_type!r} is not a choice; {nearest(rope_type, ROPE_KEYS)}"
            )
        theta = rope.get("rope_theta")
        if not _number(lambda v: v > 0)(theta):
            raise ValueError(f"rope_parameters.rope_theta={theta!r} must be a number above 0")
        needed, allowed = ROPE_KEYS[rope_type]
        for key in needed - set(rope):
            raise ValueError(f"rope_parameters.{key} is missing; rope_type={rope_type} needs it")
        for key in set(rope) - needed - allowed - {"rope_type", "rope_theta", "type"}:
            known = sorted(needed | allowed | {"rope_type", "rope_theta"})
            raise ValueError(
                f"rope_parameters.{key} is not a key of rope_type={rope_type}; {nearest(key, known)}"
            )

    @property
    def layer_attentions(self) -> list[str]:
        """The name of each layer's attention, first to last."""
        return layer_attentions(self.attention, self.num_hidden_layers)

    def attention_options_of(self, name: str) -> dict[str, Any]:
        """The options of attention `name`, which some layer has."""
        return self.attention_options if isinstance(self.attention, str) else self.attention_options[name]

    @property
    def layer_types(self) -> list[str]:
        """What each layer keeps in a cache, in transformers' words: keys and values, or a state."""
        return [
            "full_attention" if name == "softmax" else "linear_attention" for name in self.layer_attentions
        ]

    @property
    def number_of_conv_states(self) -> int:
        """What transformers gives a cache's linear-attention layers of each kind of state."""
        return NUMBER_OF_STATES

    @property
    def has_linear_rope(self) -> bool:
        """Whether some linear attention has rotary positions."""
        return any(
            self.attention_options_of(name).get("rope", "none") != "none"
            for name in set(self.layer_attentions)
        )

    @property
    def is_plain_softmax(self) -> bool:
        """Whether every layer is softmax attention without options."""
        return set(self.layer_attentions) == {"softmax"} and not has_options(
            "softmax", self.attention_options_of("softmax")
        )

    @property
    def is_llama_mlp(self) -> bool:
        """Whether the MLP is gated and without options."""
        return self.mlp == "gated" and self.mlp_options == settle_mlp_options("gated", {})

    @property
    def is_compressed(self) -> bool:
        """Whether the residual stream leaves out its last feature; see `zero_mean.py`."""
        return residual_plan(self.norm, self.norm_options, self.num_hidden_layers).compressed

    @property
    def is_recentered(self) -> bool:
        """Whether the weights keep the residual stream at zero mean, for RMSNorm; see `zero_mean.py`."""
        return bool(self.norm_options.get("recentered"))

    @property
    def stream_width(self) -> int:
        """Features of the residual stream that parameters hold: hidden_size, or one less if compressed."""
        return self.hidden_size - self.is_compressed

    @property
    def is_llama(self) -> bool:
        """Whether LlamaForCausalLM computes the same function from the same state dict."""
        llama = residual_plan("pre_rmsnorm", {}, self.num_hidden_layers)
        scales = (attention_scale(self), output_multiplier(self))
        return (
            self.quantization is None
            and self.weight_parametrization is None
            and self.is_plain_softmax
            and self.is_llama_mlp
            and scales == (self.head_dim**-0.5, 1.0)
            and residual_plan(self.norm, self.norm_options, self.num_hidden_layers) == llama
        )

    def to_diff_dict(self) -> dict[str, Any]:
        """What `save_pretrained` writes: the keys, where the code is, the interlock against Llama."""
        saved = super().to_diff_dict()
        saved["auto_map"] = {**AUTO_MAP, **saved.get("auto_map", {})}
        if not self.is_llama:
            saved[INTERLOCK] = (
                f"not a Llama: norm={self.norm}, attention={self.attention}, mlp={self.mlp}, mup={self.mup}; "
                "load with trust_remote_code=True"
            )
        return saved


__all__ = ["PRESETS", "LlmNormConfig"]
