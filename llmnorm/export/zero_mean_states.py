"""The algebra of zero-mean streams on named tensors: which of them write to the stream and which read it.

Every function takes the state dict of a Pre-LN-like model of ours and returns a new one; tensors that it does
not change are shared. Equations and sources are those of `modeling/zero_mean.py`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from llmnorm.modeling.zero_mean import compress_reader, compress_writer, decompress, recenter

State = dict[str, Tensor]

EMBEDDING, HEAD, FINAL_NORM = "model.embed_tokens.weight", "lm_head", "model.norm"
WRITERS = ("self_attn.o_proj", "mlp.down_proj")
# reader -> the norm whose output it reads
READERS = {
    **dict.fromkeys(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm"),
    **dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm"),
}


def layer_writers(state: State, num_layers: int) -> Iterator[str]:
    """Weights and biases of the matrices that write to the stream; its features are their first dimension."""
    for layer in range(num_layers):
        for module in WRITERS:
            for kind in ("weight", "bias"):
                if (name := f"model.layers.{layer}.{module}.{kind}") in state:
                    yield name


def readers(num_layers: int) -> Iterator[tuple[str, str]]:
    """(matrix that reads the stream, the norm it reads it through), the head last."""
    for layer in range(num_layers):
        for module, norm in READERS.items():
            yield f"model.layers.{layer}.{module}", f"model.layers.{layer}.{norm}"
    yield HEAD, FINAL_NORM


def compress(state: State, num_layers: int) -> State:
    """A model whose norms have neither gain nor shift left, on the stream less its last feature.

    Gains of 1 remain, so that the result is a state dict of norm=pre_crmsnorm. The head must be untied: it
    reads the stream where the embedding writes to it.
    """
    result = dict(state)
    result[EMBEDDING] = compress_writer(state[EMBEDDING], 1)
    for name in layer_writers(state, num_layers):
        result[name] = compress_writer(state[name], 0)
    for reader, norm in readers(num_layers):
        result[f"{reader}.weight"] = compress_reader(state[f"{reader}.weight"])
        result[f"{norm}.weight"] = torch.ones_like(state[f"{norm}.weight"][:-1])
    return result


def decompress_to_rmsnorm(state: State, num_layers: int) -> State:
    """norm=pre_crmsnorm -> norm=pre_rmsnorm of the same function, untied: any values are a valid model.

    Writers get back the last feature, minus the sum of the others; readers do not read it, so the last gain
    is free and is 1.
    """
    result = dict(state)
    result[EMBEDDING] = decompress(state[EMBEDDING], 1)
    for name in layer_writers(state, num_layers):
        result[name] = decompress(state[name], 0)
    for reader, norm in readers(num_layers):
        result[f"{reader}.weight"] = F.pad(state[f"{reader}.weight"], (0, 1))
        result[f"{norm}.weight"] = F.pad(state[f"{norm}.weight"], (0, 1), value=1.0)
    return result


def recenter_writers(state: State, num_layers: int) -> State:
    """P W and P b for every matrix of the layers that writes to the stream; the embedding as it is."""
    return state | {name: recenter(state[name], 0) for name in layer_writers(state, num_layers)}


def recenter_embedding(state: State, tied: bool) -> State:
    """E P, each row less its mean; a tied head goes along, an untied one that has no weights yet keeps E."""
    embedding = state[EMBEDDING]
    recentered = recenter(embedding, 1)
    head = {f"{HEAD}.weight": recentered} if tied else {}
    return {f"{HEAD}.weight": embedding} | state | {EMBEDDING: recentered} | head


def absorb_norms(state: State, num_layers: int) -> State:
    """Gains and shifts into the matrices that read them: W <- W diag(gain), b <- b + W shift.

    Norms keep gains of 1, and lose their shifts. A reader gets a bias where its norm has a shift.
    """
    result = dict(state)
    for reader, norm in readers(num_layers):
        weight, gain = state[f"{reader}.weight"], state[f"{norm}.weight"]
        result[f"{reader}.weight"] = weight * gain
        result[f"{norm}.weight"] = torch.ones_like(gain)
        if (shift := state.get(f"{norm}.bias")) is not None:
            result.pop(f"{norm}.bias", None)
            result[f"{reader}.bias"] = state.get(f"{reader}.bias", 0.0) + weight @ shift
    return result
