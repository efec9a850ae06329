"""The MLPs: what the config keys `mlp` and `mlp_options` may be.

gated    W_down (act(W_gate z) * W_up z)      LLaMA's; SwiGLU with hidden_act=silu
plain    W_down act(W_up z) / max|act'|       two matrices
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from .equation import identity
from .fused import kernels, serves
from .initialization import set_roles
from .lipschitz import MAX_SLOPES
from .options import Option, Options, is_number, is_switch, nearest
from .zero_mean import stream_linears

if TYPE_CHECKING:
    from .configuration_llmnorm import LlmNormConfig


# `hidden_act` -> the gated kernel's name for it
FUSED_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "sigmoid": "sigmoid",
}

# mlp -> option -> default and rule
MLP_OPTIONS: dict[str, dict[str, Option]] = {
    "gated": {
        "clip": Option(
            None,
            lambda value, _: value is None or (is_number(value) and value > 0),
            "must be null (SwiGLU) or a number above 0, where gate and up are cut off",
        ),
    },
    "plain": {
        "unit_slope": Option(
            True, is_switch, "must be true (the activation over its largest slope) or false"
        ),
    },
}
# mlp -> its matrices of hidden_size * intermediate_size numbers
MLP_MATRICES = {"gated": 3, "plain": 2}


def settle_mlp_options(mlp: str, given: Options) -> Options:
    """Check `mlp_options`; return them with every default filled in. Raises ValueError naming the option."""
    known = MLP_OPTIONS[mlp]
    for key, value in given.items():
        if key not in known:
            raise ValueError(f"mlp_options.{key} is not an option of mlp={mlp}; {nearest(key, known)}")
        if not known[key].accepts(value, 0):
            raise ValueError(f"mlp_options.{key}={value!r} {known[key].rule}")
    return {key: given.get(key, option.default) for key, option in known.items()}


def check_mlp(config: LlmNormConfig) -> None:
    """Raises ValueError for an MLP that other keys cannot treat."""
    if config.is_llama_mlp:
        return
    shown = f"mlp={config.mlp} with mlp_options={config.mlp_options}"
    if config.mlp_options.get("unit_slope") and config.hidden_act not in MAX_SLOPES:
        raise ValueError(
            f"mlp_options.unit_slope=True has no slope for hidden_act={config.hidden_act}; use one of "
            f"{', '.join(MAX_SLOPES)}, or unit_slope=false"
        )
    if config.quantization is not None:
        raise ValueError(f"{shown} has no 4-bit form; use mlp=gated without options, or no quantization")
    if config.norm == "ngpt" or "ngpt" in config.norm:
        raise ValueError(
            f"{shown} is not defined for norm=ngpt, which scales gate and up; use mlp=gated without options"
        )


class LlmNormMLP(nn.Module):
    """SwiGLU: MLP(z) = W_down (act(W_gate z) * W_up z) (GLU Variants Improve Transformer, arXiv 2002.05202).

    z [..., hidden_size] -> [..., hidden_size]; W_gate and W_up are [intermediate_size, hidden_size], W_down
    is [hidden_size, intermediate_size]; act is `hidden_act`, SiLU by default.

    Option `clip`: W_gate z and W_up z are cut off at -clip and clip, so that the product is
    clip (1 + max|act'|)-Lipschitz in the two; SwiGLU itself is not Lipschitz.
    """

    def __init__(self, config: LlmNormConfig, layer_idx: int) -> None:
        super().__init__()
        d, f = config.stream_width, config.intermediate_size
        reader, writer = stream_linears(config)
        self.gate_proj = reader(d, f, bias=config.mlp_bias)
        self.up_proj = reader(d, f, bias=config.mlp_bias)
        self.down_proj = writer(f, d, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]
        self.fused_activation = FUSED_ACTIVATIONS.get(config.hidden_act)
        # The clip, or nGPT's learned scales, see `hypersphere.put_on_sphere`.
        clip = config.mlp_options["clip"]
        cut: Callable[[Tensor], Tensor] = (
            identity if clip is None else partial(torch.clamp, min=-clip, max=clip)
        )
        self.gate_scale: Callable[[Tensor], Tensor] = cut
        self.up_scale: Callable[[Tensor], Tensor] = cut
        set_roles(self, layer_idx + 1, gate_proj="mlp_in", up_proj="mlp_in", down_proj="mlp_out")

    def forward(self, z: Tensor) -> Tensor:
        gate, up = self.gate_scale(self.gate_proj(z)), self.up_scale(self.up_proj(z))
        if self.fused_activation is not None and serves(gate):
            return self.down_proj(kernels.swiglu(gate, up, activation=self.fused_activation))
        return self.down_proj(self.act_fn(gate) * up)


class LlmNormPlainMLP(nn.Module):
    """MLP(z) = W_down act(W_up z) / s, s = max|act'| by option `unit_slope`, else 1 (Training Transformers
    with Enforced Lipschitz Constants, arXiv 2507.13338, with s = 1.1289, which is below tanh-GELU's slope).

    z [..., hidden_size] -> [..., hidden_size]; W_up is [intermediate_size, hidden_size], W_down
    [hidden_size, intermediate_size]; act is `hidden_act`. With s it is ||W_down|| ||W_up||-Lipschitz.
    """

    def __init__(self, config: LlmNormConfig, layer_idx: int) -> None:
        super().__init__()
        d, f = config.stream_width, config.intermediate_size
        reader, writer = stream_linears(config)
        self.up_proj = reader(d, f, bias=config.mlp_bias)
        self.down_proj = writer(f, d, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]
        self.slope = MAX_SLOPES[config.hidden_act] if config.mlp_options["unit_slope"] else 1.0
        set_roles(self, layer_idx + 1, up_proj="mlp_in", down_proj="mlp_out")

    def forward(self, z: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.up_proj(z)) / self.slope)

    def extra_repr(self) -> str:
        return f"slope={self.slope}"


# A name of the config key `mlp` -> the sublayer.
MLPS: dict[str, Callable[[LlmNormConfig, int], nn.Module]] = {"gated": LlmNormMLP, "plain": LlmNormPlainMLP}

__all__ = ["MLPS", "MLP_MATRICES", "MLP_OPTIONS", "LlmNormMLP", "LlmNormPlainMLP"]
