"""What each layer is worth and how it learns: loss without it, gradients, and which parameters are its own.

    removal of layer l:  x_l = x_{l-1}, both sublayers and their norms gone
    delta_loss_l = loss(without l) - loss            delta_perplexity_l the same of perplexities

The survivors keep what they were trained with: LayerNorm Scaling's 1/sqrt(l) of their own l, DeepNorm's
alpha of the full depth, GPAS's gates, their placement in Mix-LN. That is what folding every constant into
the weights before deleting a layer would give (The Curse of Depth, arXiv 2502.05795).

    G_l = sqrt(sum over the parameters p of layer l of ||dL/dp||^2)        g_l = ||dL/dx_l||

L is the mean loss per token of a batch; both are averaged over batches, without clipping.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llmnorm.errors import UserError
from llmnorm.evaluation.perplexity import PerplexityResult, perplexity, summed_cross_entropy
from llmnorm.evaluation.stream_statistics import block_input, block_output


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """The layers of a Hugging Face language model, first to last; UserError where they cannot be told."""
    count = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    every = [part for part in model.modules() if isinstance(part, nn.ModuleList)]
    inner = {id(part) for outer in every for entry in outer for part in entry.modules()}
    lists = [part for part in every if len(part) == count and id(part) not in inner]
    if len(lists) != 1 or not count:
        raise UserError(
            f"the layers of {type(model).__name__} cannot be told: {len(lists)} of its module lists have "
            f"num_hidden_layers={count} entries; diagnostics need a decoder with one list of layers."
        )
    return list(lists[0])


def group_parameters(
    model: nn.Module, blocks: Sequence[nn.Module]
) -> tuple[list[list[nn.Parameter]], dict[str, list[nn.Parameter]]]:
    """The trainable parameters of each layer, and those outside by the name of their module.

    A parameter with two names (tied embedding and head) is in the first group only.
    """
    taken: set[int] = set()

    def new(parameters: Iterator[nn.Parameter]) -> list[nn.Parameter]:
        fresh = [p for p in parameters if p.requires_grad and id(p) not in taken]
        taken.update(map(id, fresh))
        return fresh

    layers = [new(block.parameters()) for block in blocks]
    outside: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if fresh := new(iter([parameter])):
            owner = name.rpartition(".")[0].removeprefix("model.") or name
            outside.setdefault(owner, []).extend(fresh)
    return layers, outside


@contextmanager
def removed(block: nn.Module) -> Iterator[None]:
    """Let `block` return its input, so that the layer computes nothing that anyone sees."""

    def bypass(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        x = block_input(args, kwargs)
        return (x, *output[1:]) if isinstance(output, tuple) else x

    handle = block.register_forward_hook(bypass, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def layer_removal(
    model: nn.Module, blocks: Sequence[nn.Module], token_ids: Any, **options: Any
) -> dict[str, Any]:
    """Loss and perplexity with all layers and without each; options: those of `perplexity`."""
    whole = perplexity(model, token_ids, **options)
    without: list[PerplexityResult] = []
    for block in blocks:
        with removed(block):
            without.append(perplexity(model, token_ids, **options))
    return {
        "loss": whole.loss,
        "perplexity": whole.perplexity,
        "scored_tokens": whole.tokens,
        "removal_loss": [result.loss for result in without],
        "removal_delta_loss": [result.loss - whole.loss for result in without],
        "removal_perplexity": [result.perplexity for result in without],
        "removal_delta_perplexity": [result.perplexity - whole.perplexity for result in without],
    }


class GradientStatistics:
    """Averages G_l and g_l over batches; the model's own gradients are left as they were."""

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module]) -> None:
        self.model = model
        self.blocks = blocks
        self.layers, self.outside = group_parameters(model, blocks)
        self.batches = 0
        self.norms = torch.zeros(len(self.layers) + len(self.outside), dtype=torch.float64)
        self.stream_norms = torch.zeros(len(blocks) + 1, dtype=torch.float64)

    def add(self, inputs: Tensor, targets: Tensor) -> None:
        """One batch, inputs and targets [B, T]; the model computes in the mode and precision it is in."""
        groups = [*self.layers, *self.outside.values()]
        parameters = [parameter for group in groups for parameter in group]
        with torch.enable_grad(), _kept_streams(self.blocks) as streams:
            logits = self.model(input_ids=inputs, use_cache=False).logits
            loss = summed_cross_entropy(logits, targets) / targets.numel()
            found = torch.autograd.grad(loss, [*streams, *parameters], allow_unused=True)
        norms = [0.0 if g is None else float(torch.linalg.vector_norm(g.double())) for g in found]
        self.stream_norms += torch.tensor(norms[: len(streams)], dtype=torch.float64)
        squares = iter(norm**2 for norm in norms[len(streams) :])
        per_group = [sum(next(squares) for _ in group) ** 0.5 for group in groups]
        self.norms += torch.tensor(per_group, dtype=torch.float64)
        self.batches += 1

    def result(self) -> dict[str, Any]:
        norms = (self.norms / self.batches).tolist()
        return {
            "gradient_norm": norms[: len(self.layers)],
            "gradient_norm_outside": dict(zip(self.outside, norms[len(self.layers) :], strict=True)),
            "stream_gradient_norm": (self.stream_norms / self.batches).tolist(),
            "gradient_batches": self.batches,
        }


@contextmanager
def _kept_streams(blocks: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """x_0 ... x_L of the next forward pass, as nodes of its graph."""
    streams: list[Tensor] = []

    def entered(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        streams.append(block_input(args, kwargs))

    def left(module: nn.Module, args: Any, output: Any) -> None:
        streams.append(block_output(output))

    handles = [blocks[0].register_forward_pre_hook(entered, with_kwargs=True)]
    handles += [block.register_forward_hook(left) for block in blocks]
    try:
        yield streams
    finally:
        for handle in handles:
            handle.remove()
