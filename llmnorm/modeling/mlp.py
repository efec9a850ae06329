"""The gated MLP of LLaMA."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor, nn
from transformers.activations import ACT2FN

from .equation import identity
from .fused import kernels, serves
from .initialization import set_roles
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


class LlmNormMLP(nn.Module):
    """SwiGLU: MLP(z) = W_down (act(W_gate z) * W_up z) (GLU Variants Improve Transformer, arXiv 2002.05202).

    z [..., hidden_size] -> [..., hidden_size]; W_gate and W_up are [intermediate_size, hidden_size], W_down
    is [hidden_size, intermediate_size]; act is `hidden_act`, SiLU by default.
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
        # nGPT's, see `hypersphere.put_on_sphere`.
        self.gate_scale: Callable[[Tensor], Tensor] = identity
        self.up_scale: Callable[[Tensor], Tensor] = identity
        set_roles(self, layer_idx + 1, gate_proj="mlp_in", up_proj="mlp_in", down_proj="mlp_out")

    def forward(self, z: Tensor) -> Tensor:
        gate, up = self.gate_scale(self.gate_proj(z)), self.up_scale(self.up_proj(z))
        if self.fused_activation is not None and serves(gate):
            return self.down_proj(kernels.swiglu(gate, up, activation=self.fused_activation))
        return self.down_proj(self.act_fn(gate) * up)
