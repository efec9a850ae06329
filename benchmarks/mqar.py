"""Multi-query associative recall: what an attention remembers of the pairs it has read.

    python benchmarks/mqar.py [--variants softmax nalaformer ...] [--seeds 3] [--steps 500] [--output FILE]
    python benchmarks/mqar.py --table [--into docs/attention.md]      the runs so far as a table

The task of Zoology (arXiv 2312.04927): a sequence lists P pairs "key value" with distinct keys, then asks for
every key once more in another order; the loss and the accuracy are those of the value after each repeated
key. The state of a linear attention is of fixed size, so that it must blur pairs that softmax attention keeps
apart. All variants share the shape, the data of a seed and the number of parameters (the MLP's width is
chosen so); each learning rate of --lrs is tried on the first seed, and the best one serves all seeds.
Accuracy is of 1,024 fresh sequences for each number of pairs. Results are added to the JSON run by run:
start the command again to go on.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from tables import put_into
from torch import Tensor

from llmnorm.evaluation import describe_environment
from llmnorm.modeling import LlmNormConfig, LlmNormForCausalLM, initialize_weights

RESULT = Path(__file__).parent / "results" / "mqar.json"
KEYS, VALUES = 16, 16
TRAINED_PAIRS, TESTED_PAIRS = 8, (2, 4, 8)
SHAPE: dict[str, Any] = {
    "vocab_size": KEYS + VALUES,
    "hidden_size": 128,  # the 2m preset
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
REFERENCE_WIDTH = 352  # the softmax model's MLP; the others' follows from its number of parameters
VARIANTS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "sla": {"attention": "sla"},
    "relu": {"attention": "nalaformer", "attention_options": {"feature_map": "relu"}},
    "nalaformer": {"attention": "nalaformer"},
    "hybrid_3_1": {"attention": {"softmax_every": 4}, "num_hidden_layers": 8},  # 6 does not divide by 4
}


def draw(batch: int, pairs: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """ids [batch, 4 pairs] and labels, the value at each repeated key and -100 elsewhere."""
    keys = torch.rand(batch, KEYS, generator=generator).argsort(1)[:, :pairs]
    values = KEYS + torch.randint(0, VALUES, (batch, pairs), generator=generator)
    order = torch.rand(batch, pairs, generator=generator).argsort(1)
    told = torch.stack((keys, values), 2).flatten(1)
    asked = torch.stack((keys.gather(1, order), values.gather(1, order)), 2).flatten(1)
    labels = torch.full((batch, 4 * pairs), -100)
    labels[:, 2 * pairs :: 2] = asked[:, 1::2]
    return torch.cat((told, asked), 1), labels


def _build(changes: dict[str, Any], width: int) -> LlmNormForCausalLM:
    return LlmNormForCausalLM(LlmNormConfig(**{**SHAPE, "intermediate_size": width, **changes}))


def _size(changes: dict[str, Any], width: int) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in _build(changes, width).parameters())


def matched_width(changes: dict[str, Any]) -> int:
    """The MLP width, a multiple of 4, at which the variant has the softmax model's number of parameters."""
    budget = _size({}, REFERENCE_WIDTH)
    return min(range(16, 2 * REFERENCE_WIDTH, 4), key=lambda width: abs(_size(changes, width) - budget))


def accuracy(model: LlmNormForCausalLM, pairs: int) -> float:
    generator = torch.Generator().manual_seed(10_000 + pairs)
    ids, labels = draw(1024, pairs, generator)
    right = asked = 0
    with torch.no_grad():
        for x, y in zip(ids.split(128), labels.split(128), strict=True):
            guess = model(x, use_cache=False).logits.argmax(-1)
            right += int((guess == y).sum())
            asked += int((y != -100).sum())
    return right / asked


def run(changes: dict[str, Any], seed: int, lr: float, steps: int, batch: int) -> dict[str, Any]:
    """Train one model and measure it."""
    width = matched_width(changes)
    model = _build(changes, width).train()
    initialize_weights(model, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * min(1.0, step / steps))),
    )
    generator = torch.Generator().manual_seed(seed)
    begun = time.perf_counter()
    for _ in range(steps):
        ids, labels = draw(batch, TRAINED_PAIRS, generator)
        loss = model(ids, shift_labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()
    return {
        "seed": seed,
        "lr": lr,
        "steps": steps,
        "batch": batch,
        "parameters": _size(changes, width),
        "intermediate_size": width,
        "loss": loss.item(),
        "accuracy": {str(pairs): accuracy(model, pairs) for pairs in TESTED_PAIRS},
        "seconds": time.perf_counter() - begun,
    }


class Results:
    """The runs so far, by variant; each one is on disk before the next begins."""

    def __init__(self, path: Path) -> None:
        self.path = path
        known = json.loads(path.read_text()) if path.exists() else {}
        self.runs: dict[str, list[dict[str, Any]]] = known.get("runs", {})

    def find(self, variant: str, **keys: Any) -> dict[str, Any] | None:
        rows = self.runs.get(variant, [])
        return next((row for row in rows if all(row[key] == value for key, value in keys.items())), None)

    def add(self, variant: str, row: dict[str, Any]) -> None:
        self.runs.setdefault(variant, []).append(row)
        content = {
            "task": {"keys": KEYS, "values": VALUES, "trained_pairs": TRAINED_PAIRS, **SHAPE},
            "environment": describe_environment(),
            "runs": self.runs,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        aside = self.path.with_suffix(".tmp")
        aside.write_text(json.dumps(content, indent=1) + "\n")
        aside.replace(self.path)


def table(path: Path) -> str:
    """Mean and spread of the accuracy over the seeds, at each variant's best learning rate."""
    content = json.loads(path.read_text())
    heads = [f"{pairs} pairs" for pairs in TESTED_PAIRS]
    lines = [
        f"| attention | parameters | lr | seeds | {' | '.join(heads)} |",
        f"| --- | ---: | ---: | ---: | {' | '.join('---:' for _ in heads)} |",
    ]
    for variant, rows in content["runs"].items():
        counts = {lr: sum(row["lr"] == lr for row in rows) for lr in {row["lr"] for row in rows}}
        best = max(counts, key=lambda lr: (counts[lr], _hardest(next(r for r in rows if r["lr"] == lr))))
        kept = [row for row in rows if row["lr"] == best]
        cells = []
        for pairs in TESTED_PAIRS:
            numbers = [100 * row["accuracy"][str(pairs)] for row in kept]
            spread = f" ± {statistics.stdev(numbers):.1f}" if len(numbers) > 1 else ""
            cells.append(f"{statistics.mean(numbers):.1f}{spread}")
        size = kept[0]["parameters"]
        lines.append(f"| {variant} | {size:,} | {best:g} | {len(kept)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _hardest(row: dict[str, Any]) -> float:
    return row["accuracy"][str(TRAINED_PAIRS)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lrs", nargs="+", type=float, default=[1e-3, 3e-3])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--table", action="store_true", help="print the table of the runs so far")
    parser.add_argument("--into", type=Path, help="with --table: the page of docs that holds it")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(arguments.output))
        if arguments.into:
            put_into(arguments.into, "mqar", table(arguments.output))
        return
    results = Results(arguments.output)

    def measured(variant: str, seed: int, lr: float) -> dict[str, Any]:
        size = {"steps": arguments.steps, "batch": arguments.batch}
        found = results.find(variant, seed=seed, lr=lr, **size)
        if found is None:
            found = run(VARIANTS[variant], seed, lr, **size)
            results.add(variant, found)
            print(
                f"{variant} seed {seed} lr {lr:g}: {found['accuracy']} in {found['seconds']:.0f} s",
                flush=True,
            )
        return found

    best = {
        variant: max(arguments.lrs, key=lambda lr: _hardest(measured(variant, 0, lr)))
        for variant in arguments.variants
    }
    for seed in range(1, arguments.seeds):
        for variant in arguments.variants:
            measured(variant, seed, best[variant])


if __name__ == "__main__":
    main()
