"""Statistics over tokens, and their running values: the ground under PowerNorm, Unified Norm and PRepBN.

Such a norm reads, in training, statistics over the tokens of the batch and, in eval mode, running ones. One
update of the weights moves the running statistics once, by the tokens of all its micro-batches and of all
processes:

    forward and backward passes add to `pending`  ->  commit_statistics(model)  after the optimizer's step
                                                      drop_statistics(model)    where the step is dropped

once `defer_statistics(model)` was called, as the training loop does. Otherwise every forward and backward
pass moves them, as in torch's BatchNorm. A layer that is computed again for its backward pass finds in the
`TokenSet` of its forward pass what it saw the first time, so nothing is counted twice and nothing differs.

`norm_options.statistics` says what stands in for the statistic of the current batch:

    batch      all tokens of the micro-batch, of all processes (`synchronize: false`: of this one). Tokens see
               the future and the other sequences
    prefix     of each token: the tokens of its own document up to it
    running    the running statistic from before this step
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import initialization as hf_init


class TokenSet:
    """The tokens of one forward pass of the model that statistics are over.

    mask [B, T], true where a token counts (None: everywhere). begins [B, T], the index in its row where the
    document of each token begins (None: 0). `found` is what each norm found in this forward pass.
    """

    def __init__(self, mask: Tensor | None = None, begins: Tensor | None = None) -> None:
        self.mask = mask
        self.begins = begins
        self.found: dict[nn.Module, Any] = {}


def token_set(
    x: Tensor, token_mask: Tensor | None, attention_mask: Tensor | None, position_ids: Tensor | None
) -> TokenSet:
    """The tokens of x [B, T, d] that `token_mask`, or else a padding mask [B, T], keeps; documents begin
    where `position_ids` are 0.
    """
    mask = attention_mask if token_mask is None else token_mask
    if mask is not None and mask.shape != x.shape[:2]:
        mask = None  # a mask over pairs of tokens says nothing about padding
    begins = None
    if position_ids is not None:
        here = torch.arange(x.shape[1], device=x.device)
        begins = (here - position_ids).clamp(min=0).expand(x.shape[:2])
    return TokenSet(None if mask is None else mask.bool(), begins)


def no_token_set(*_: Any) -> None:
    """For a model without such norms."""


def _ignore_tokens(tokens: TokenSet | None) -> None:
    pass


class Observe:
    """tokens -> every norm with statistics in `owner` takes them; as a class, so that a copied model's
    observes the copies.
    """

    def __init__(self, owner: nn.Module) -> None:
        self.norms = tuple(batch_norms(owner))

    def __call__(self, tokens: TokenSet | None) -> None:
        for norm in self.norms:
            norm.tokens = tokens


def observer(owner: nn.Module) -> Callable[[TokenSet | None], None]:
    """What hands the tokens of a forward pass to the norms in `owner`; does nothing where there are none."""
    observe = Observe(owner)
    return observe if observe.norms else _ignore_tokens


def pooled(sums: Tensor, synchronize: bool = True) -> Tensor:
    """`sums` over all processes; a new tensor."""
    sums = sums.clone()
    if synchronize and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(sums)
    return sums


def widen(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def counted(mask: Tensor | None, values: Tensor) -> Tensor:
    """values [B, T, d], and 0 for the tokens that do not count."""
    return values if mask is None else values.masked_fill(~mask[..., None], 0)


def token_sums(mask: Tensor | None, *values: Tensor) -> Tensor:
    """[1 + n d] in fp64: how many tokens count, then the sum over them of each of `values` [..., d]."""
    number = values[0][..., 0].numel() if mask is None else mask.sum()
    count = torch.zeros(1, dtype=torch.float64, device=values[0].device) + number
    return torch.cat([count, *(counted(mask, v).flatten(0, -2).sum(0).double() for v in values)])


def means(sums: Tensor) -> Tensor:
    """The means behind `token_sums`; 0 where no token counts."""
    return sums[1:] / sums[0].clamp(min=1)


def prefix_means(tokens: TokenSet | None, values: Tensor, otherwise: Tensor, least: int = 1) -> Tensor:
    """For each token the mean of values [B, T, d] over the tokens that count in its document up to itself;
    `otherwise` [d] where those are fewer than `least`.
    """
    mask = torch.ones(values.shape[:2], device=values.device, dtype=torch.bool)
    begins = None
    if tokens is not None:
        mask = mask if tokens.mask is None else tokens.mask
        begins = tokens.begins
    sums = torch.cat([counted(mask, values), mask[..., None].to(values.dtype)], dim=-1)
    totals = sums.cumsum(1)
    if begins is not None:
        before = (totals - sums).gather(1, begins[..., None].expand_as(totals))
        totals = totals - before
    total, count = totals[..., :-1], totals[..., -1:]
    return torch.where(count >= least, total / count.clamp(min=1), otherwise.to(values.dtype))


class BatchStatisticsNorm(nn.Module):
    """A norm over d features with running statistics, in fp32 or wider whatever the dtype of the model.

    `updates`, an integer in every checkpoint, counts the updates that moved the statistics. A subclass
    records sums in its forward and backward passes (`record`) and says how their means move its buffers
    (`move`). `coefficients` of eval mode's y = a * x + b is what folds into the next linear layer.
    """

    initial_statistics: ClassVar[dict[str, float]] = {}
    tokens: TokenSet | None = None
    deferred = False
    recording = True
    updates: Tensor

    def __init__(self, hidden_size: int, eps: float, statistics: str, synchronize: bool) -> None:
        super().__init__()
        self.hidden_size, self.eps = hidden_size, eps
        self.statistics, self.synchronize = statistics, synchronize
        self.register_buffer("updates", torch.zeros(1, dtype=torch.int64))
        self.pending: dict[str, Tensor] = {}
        self._known_step: tuple[Tensor, int, int] | None = None

    def add_statistic(self, name: str, *shape: int) -> None:
        value = self.initial_statistics[name]
        self.register_buffer(name, torch.full(shape, value, dtype=torch.float32))

    def rebuild_buffers(self) -> None:
        """The statistics of a norm that has seen nothing; what transformers has loaded stays as it is."""
        hf_init.zeros_(self.updates)
        for name, value in self.initial_statistics.items():
            hf_init.constant_(getattr(self, name), value)
        self.pending = {}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow the model to its device but stay in fp32 or wider: bf16 would round a small step away."""
        before = {name: getattr(self, name) for name in self.initial_statistics}
        super()._apply(fn, recurse)
        for name, wide in before.items():
            moved = getattr(self, name)
            if torch.promote_types(moved.dtype, torch.float32) != moved.dtype:
                setattr(self, name, wide.float().to(moved.device))
        return self

    @property
    def step(self) -> int:
        """`updates` as a number, read from the device only where something else than a commit changed it."""
        updates = self.updates
        version = 0 if updates.is_inference() else updates._version
        known = self._known_step
        if known is None or known[0] is not updates or known[1] != version:
            known = self._known_step = (updates, version, int(updates))
        return known[2]

    def found(self, observe: Callable[[Tensor], Any], x: Tensor) -> Any:
        """observe(x), called once in a forward pass of the model, however often layers are computed again."""
        if self.tokens is None:
            return observe(x)
        if self not in self.tokens.found:
            self.tokens.found[self] = observe(x)
        return self.tokens.found[self]

    @property
    def mask(self) -> Tensor | None:
        return None if self.tokens is None else self.tokens.mask

    @torch.no_grad()
    def record(self, kind: str, sums: Tensor) -> None:
        """Add the `token_sums` of a "forward" or "backward" pass to what the next commit moves by."""
        if not self.recording:
            return
        self.pending[kind] = self.pending[kind] + sums if kind in self.pending else sums
        if not self.deferred:
            self.commit(pooled(self.pending.pop(kind)), [kind])

    @torch.no_grad()
    def commit(self, sums: Tensor, kinds: list[str]) -> None:
        """Move the running statistics by the sums of `kinds` over all processes, one after the other."""
        forward = "forward" in kinds
        number = self.step + forward
        for kind, part in zip(kinds, sums.split([self.sizes[kind] for kind in kinds]), strict=True):
            self.move(kind, part, number)
        if forward:
            self.updates += 1
            self._known_step = (self.updates, self.updates._version, number)

    @property
    def sizes(self) -> dict[str, int]:
        """The length of the sums of each kind."""
        return {"forward": 1 + self.hidden_size, "backward": 1 + self.hidden_size}

    def move(self, kind: str, sums: Tensor, number: int) -> None:
        """Move the running statistics in update `number`, counted from 1, by sums that may be of no token."""
        raise NotImplementedError

    def coefficients(self) -> tuple[Tensor, Tensor]:
        """(a, b), each [d], of eval mode's y = a * x + b.

        Raises: ValueError: eval mode is no such function, and why.
        """
        raise NotImplementedError


def toward(running: Tensor, mean: Tensor, decay: float, sums: Tensor) -> None:
    """running <- decay * running + (1 - decay) * mean, unless `sums` are of no token."""
    moved = torch.lerp(mean.to(running.dtype), running, decay)
    running.copy_(torch.where(sums[0] > 0, moved, running))


def batch_norms(model: nn.Module) -> Iterator[BatchStatisticsNorm]:
    """The norms of `model` that keep running statistics."""
    return (module for module in model.modules() if isinstance(module, BatchStatisticsNorm))


def defer_statistics(model: nn.Module) -> None:
    """From now on only `commit_statistics` moves the running statistics of `model`."""
    for norm in batch_norms(model):
        norm.deferred = True


def drop_statistics(model: nn.Module) -> None:
    """Forget what was recorded since the last commit."""
    for norm in batch_norms(model):
        norm.pending = {}


@torch.no_grad()
def commit_statistics(model: nn.Module) -> None:
    """Move the running statistics of `model` by all that was recorded since the last commit, in one message.

    Collective, if there are several processes.
    """
    norms = [norm for norm in batch_norms(model) if norm.pending]
    if not norms:
        return
    parts = [torch.cat(list(norm.pending.values())) for norm in norms]
    for norm, sums in zip(norms, pooled(torch.cat(parts)).split([len(p) for p in parts]), strict=True):
        norm.commit(sums, list(norm.pending))
        norm.pending = {}


@contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Within, forward and backward passes in training mode record nothing."""
    norms = list(batch_norms(model))
    before = [norm.recording for norm in norms]
    for norm in norms:
        norm.recording = False
    try:
        yield
    finally:
        for norm, recording in zip(norms, before, strict=True):
            norm.recording = recording
