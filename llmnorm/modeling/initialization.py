"""Initial values of every parameter: one table of rules, drawn in two ways.

`initialize_weights(model, seed)` is how training starts: each parameter comes from its own generator, so the
result depends on the seed and on the parameter's name, never on the device, the number of processes or the
order of drawing. transformers' own path (`PreTrainedModel._init_weights`, for a model built eagerly and for
parameters that a checkpoint lacks) uses the same rules with the global generator.

A module says what its parameters are: matrices by a role, given by `set_roles` in the constructor of its
owner; other parameters by an attribute `initial_values`, from name to constant or distribution. What follows
from its weight it computes itself, `derived_values(weight)`. Biases are 0, and so is the embedding of the
padding token.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import initialization as hf_init

from .mup import width_multiplier
from .zero_mean import compress_reader, compress_writer, recenter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .configuration_llmnorm import LlmNormConfig


@dataclass(frozen=True)
class Normal:
    """N(0, std^2), redrawn beyond `cutoff` standard deviations if there is a cutoff."""

    std: float
    cutoff: float | None = None


@dataclass(frozen=True)
class SemiOrthogonal:
    """Uniformly random with all singular values equal to `gain`."""

    gain: float


Distribution = Normal | SemiOrthogonal | float


@dataclass(frozen=True)
class Site:
    """What a rule may depend on: `depth` counts layers from 1 and is 0 outside them, the matrix is [fan_out,
    fan_in]. Under muP these are the sizes at the base width.
    """

    initializer_range: float
    hidden_size: float
    num_layers: int
    depth: int
    fan_in: float
    fan_out: float


Rule = Callable[[Site], Distribution]


def _initializer_range(site: Site) -> Normal:
    return Normal(site.initializer_range)


def _over_sqrt_2L(site: Site) -> Normal:
    return Normal(site.initializer_range / math.sqrt(2 * site.num_layers))


def _over_sqrt_2_depth(site: Site) -> Normal:
    return Normal(site.initializer_range / math.sqrt(2 * site.depth))


def _mitchell_in(site: Site) -> Normal:
    return Normal(site.hidden_size**-0.5, cutoff=3.0)


def _mitchell_out(site: Site) -> Normal:
    return Normal((2 * site.fan_in * site.depth) ** -0.5, cutoff=3.0)


def _small(site: Site) -> Normal:
    return Normal(math.sqrt(2 / (5 * site.hidden_size)))


def _unit_embedding(site: Site) -> Normal:
    return Normal(math.sqrt(2 / 5))


def _unit(site: Site) -> Normal:
    return Normal(1.0)


def _zero(site: Site) -> float:
    return 0.0


def _orthogonal(site: Site) -> SemiOrthogonal:
    return SemiOrthogonal(math.sqrt(site.fan_out / site.fan_in))


def _xavier(site: Site) -> Normal:
    return Normal(math.sqrt(2 / (site.fan_in + site.fan_out)))


def _xavier_deepnorm(site: Site) -> Normal:
    return Normal((8 * site.num_layers) ** -0.25 * _xavier(site).std)


# attention_in: W_q and W_k; attention_value: W_v.
ROLES = (
    "embedding",
    "lm_head",
    "attention_in",
    "attention_value",
    "attention_out",
    "mlp_in",
    "mlp_out",
)

# init -> role -> rule; a role that is absent is drawn from N(0, initializer_range^2).
INIT_RULES: dict[str, dict[str, Rule]] = {
    # transformers' Llama.
    "hf_llama": {},
    # GPT-2, Megatron: residual writers over sqrt(2L).
    "scaled": {"attention_out": _over_sqrt_2L, "mlp_out": _over_sqrt_2L},
    # Residual writers over sqrt(2 l) (The Curse of Depth, arXiv 2502.05795, ablation).
    "depth_scaled": {"attention_out": _over_sqrt_2_depth, "mlp_out": _over_sqrt_2_depth},
    # OLMo-1.
    "mitchell": {
        "embedding": _mitchell_in,
        "lm_head": _mitchell_in,
        "attention_in": _mitchell_in,
        "attention_value": _mitchell_in,
        "mlp_in": _mitchell_in,
        "attention_out": _mitchell_out,
        "mlp_out": _mitchell_out,
    },
    # Transformers without Tears, arXiv 1910.05895: sqrt(2/(5d)) for attention.
    "small_init": {"attention_in": _small, "attention_value": _small, "attention_out": _small},
    # Spike No More, arXiv 2312.16903; hard-coded in the released Mix-LN, LNS and GPAS code.
    "scaled_embed": {"embedding": _unit_embedding},
    # `scaled` and `scaled_embed` together (Mix-LN, arXiv 2412.13795, stabilizers).
    "scaled_and_embed": {
        "embedding": _unit_embedding,
        "attention_out": _over_sqrt_2L,
        "mlp_out": _over_sqrt_2L,
    },
    # arXiv 2507.13338: each matrix maps root mean square to root mean square with norm 1, W_o starts at 0.
    "orthogonal": {
        "embedding": _unit,
        "attention_out": _zero,
        **dict.fromkeys(("attention_in", "attention_value", "mlp_in", "mlp_out", "lm_head"), _orthogonal),
    },
    # TorchTitan: the output layer has standard deviation d^(-1/2), cut at 3.
    "megatron_head": {"lm_head": _mitchell_in},
}

# norm -> role -> rule: initializations that belong to a placement. While `norm_options.own_init` is true they
# come before those of INIT_RULES.
NORM_RULES: dict[str, dict[str, Rule]] = {
    # DeepNet, arXiv 2203.00555: gain (8L)^(-1/4) but for queries and keys.
    "deepnorm": {
        "attention_in": _xavier,
        **dict.fromkeys(("attention_value", "attention_out", "mlp_in", "mlp_out"), _xavier_deepnorm),
    },
    # After Fixup, arXiv 1901.09321: with 2L branches of two matrices each, the first times (2L)^(-1/2) and
    # the last 0, and the output layer 0. No norm scales the stream, so the embedding has unit variance.
    "none": {
        "embedding": _unit,
        "lm_head": _zero,
        **dict.fromkeys(("attention_value", "mlp_in"), _over_sqrt_2L),
        **dict.fromkeys(("attention_out", "mlp_out"), _zero),
    },
}


def role_rules(config: LlmNormConfig, depth: int) -> dict[str, Rule]:
    """role -> rule in the layer at `depth`; in a list of norms, embedding and head (0) have init's alone."""
    norm = config.norm if isinstance(config.norm, str) else config.norm[depth - 1] if depth else None
    if norm == "gpas":
        norm = config.norm_options["base"]  # its base's initialization is its own
    own = NORM_RULES.get(norm or "", {}) if config.norm_options.get("own_init") else {}
    return {**INIT_RULES[config.init], **own}


def starts_at_zero(config: LlmNormConfig, role: str, depth: int) -> bool:
    """Whether matrices of `role` in the layer at `depth` are 0 at first."""
    return role_rules(config, depth).get(role) is _zero


# role -> how a matrix of that role is cut down to a compressed stream, and the dimension that is. What is
# drawn has all of hidden_size, so a seed gives a compressed model the function of the Pre-LN model it gives.
COMPRESSIONS: dict[str, tuple[Callable[[Tensor, int], Tensor], int]] = {
    "embedding": (compress_writer, 1),
    **dict.fromkeys(("attention_out", "mlp_out"), (compress_writer, 0)),
    **dict.fromkeys(("attention_in", "attention_value", "mlp_in", "lm_head"), (compress_reader, 1)),
}


_ROLE = "initialization_role"  # attribute of a module: (role, depth)


def set_roles(owner: nn.Module, depth: int, **roles: str) -> None:
    """Say what the weights of `owner`'s children are for, by child; `depth` is 1 for the first layer."""
    for name, role in roles.items():
        assert role in ROLES, role
        # On the module, not on its weight: `to_empty` makes new parameters.
        setattr(owner.get_submodule(name), _ROLE, (role, depth))


def _role(module: nn.Module) -> str:
    """The role of `module`'s weight, or nothing."""
    # transformers makes new embeddings and heads itself when the vocabulary is resized.
    default = {nn.Embedding: "embedding", nn.Linear: "lm_head"}.get(type(module), "")
    return getattr(module, _ROLE, (default, 0))[0]


def take_role(module: nn.Module, former: nn.Module) -> None:
    """Give `module`, which replaces `former`, the role that `set_roles` gave that."""
    if hasattr(former, _ROLE):
        setattr(module, _ROLE, getattr(former, _ROLE))


def parameter_rule(module: nn.Module, name: str, config: LlmNormConfig) -> Distribution:
    """The rule for `module`'s own parameter `name`: a distribution or a constant.

    Raises:
        TypeError: the module is neither in a role nor lists the parameter in `initial_values`.
    """
    constants: dict[str, Distribution] = getattr(module, "initial_values", {})
    if name in constants:
        return constants[name]
    if name == "bias":
        return 0.0
    role = _role(module)
    if not role or name != "weight":
        raise TypeError(
            f"{type(module).__name__}.{name} has no initial value: set_roles or initial_values must name it"
        )
    depth = getattr(module, _ROLE, (role, 0))[1]
    fan_out, fan_in = getattr(module, name).shape
    wider = width_multiplier(config)
    hidden = role not in ("embedding", "lm_head")
    site = Site(
        initializer_range=config.initializer_range,
        hidden_size=config.hidden_size / wider,
        num_layers=config.num_hidden_layers,
        depth=depth,
        fan_in=fan_in / wider,
        fan_out=fan_out / wider if hidden else fan_out,
    )
    rule = role_rules(config, depth).get(role, _initializer_range)(site)
    if hidden and isinstance(rule, Normal):
        return replace(rule, std=rule.std / math.sqrt(wider))
    return rule


def draw(
    module: nn.Module, name: str, config: LlmNormConfig, generator: torch.Generator | None, device: Any
) -> Tensor:
    """A value in fp32 for `module`'s own parameter `name`, drawn by its rule; a padding row is 0."""
    rule, shape = parameter_rule(module, name, config), list(getattr(module, name).shape)
    compression = COMPRESSIONS.get(_role(module)) if config.is_compressed and name == "weight" else None
    if compression is not None:
        shape[compression[1]] += 1
    elif getattr(module, "zero_mean_outputs", False) and name == "weight":
        compression = (recenter, 0)
    value = torch.empty(shape, dtype=torch.float32, device=device)
    fill(value, rule, generator)
    padding_row = _padding_row(module)
    if padding_row is not None:
        value[padding_row].zero_()
    if compression is not None:
        return compression[0](value, compression[1])
    return _projected(module, name, value)


def fill(tensor: Tensor, rule: Distribution, generator: torch.Generator | None = None) -> None:
    """Draw `tensor` in place by `rule`; what transformers has marked as loaded stays as it is."""
    if isinstance(rule, float):
        hf_init.constant_(tensor, rule)
    elif isinstance(rule, SemiOrthogonal):
        hf_init.orthogonal_(tensor, gain=rule.gain, generator=generator)
    elif rule.cutoff is None:
        hf_init.normal_(tensor, std=rule.std, generator=generator)
    else:
        edge = rule.cutoff * rule.std
        hf_init.trunc_normal_(tensor, std=rule.std, a=-edge, b=edge, generator=generator)


def _padding_row(module: nn.Module) -> int | None:
    return module.padding_idx if isinstance(module, nn.Embedding) else None


def _projected(module: nn.Module, name: str, value: Tensor) -> Tensor:
    """The whole weight `value` as `module` wants it, where it has a rule: see `hypersphere.py`."""
    projected = getattr(module, "projected", None)
    return value if projected is None or name != "weight" else projected(value)


def _finish(module: nn.Module, weight: Tensor | None) -> None:
    """Fill what is computed: buffers, and `derived_values`, which follow from the module's whole `weight`."""
    rebuild = getattr(module, "rebuild_buffers", None)
    if rebuild is not None:
        rebuild()
    derived = getattr(module, "derived_values", None)
    for name, value in derived(weight).items() if derived is not None else ():
        if not getattr(getattr(module, name), "_is_hf_initialized", False):
            _store(getattr(module, name), value)


@torch.no_grad()
def initialize_module(module: nn.Module, config: LlmNormConfig) -> None:
    """transformers' `_init_weights`: the rules, drawn from the global generator."""
    for name, parameter in module.named_parameters(recurse=False):
        if not getattr(parameter, "_is_hf_initialized", False):
            _store(parameter, draw(module, name, config, None, parameter.device))
    _finish(module, getattr(module, "weight", None))


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _store(parameter: Any, value: Tensor) -> None:
    """Copy the whole value, or this process's shard of it if the parameter is a DTensor."""
    if hasattr(parameter, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        # src_data_rank=None: every process has drawn the same values, so nothing is sent.
        sharded = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.to_local().copy_(sharded.to_local())
    else:
        parameter.copy_(value)


@torch.no_grad()
def initialize_weights(model: PreTrainedModel, seed: int) -> None:
    """Draw every parameter of `model` by its config's `init` rule and fill every buffer, in place.

    Each parameter is drawn whole, in fp32 on the CPU, from a generator seeded by (seed, fully qualified
    name), then cast; a DTensor keeps its shard. So a model built on the meta device and emptied onto any
    device, sharded over any number of processes, starts from the same weights as one built eagerly. Tied
    weights are tied again and drawn once.
    """
    model.tie_weights()  # `to_empty` unties
    config = cast("LlmNormConfig", model.config)
    done: set[int] = set()
    for prefix, module in model.named_modules():
        weight = None
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in done:
                continue
            done.add(id(parameter))
            value = draw(module, name, config, _generator(seed, f"{prefix}.{name}"), "cpu")
            weight = value if name == "weight" else weight
            _store(parameter, value)
        _finish(module, weight)
