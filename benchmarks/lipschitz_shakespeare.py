"""Accuracy against a Lipschitz constant that is proven: caps and optimizers on Shakespeare's characters.

    python benchmarks/lipschitz_shakespeare.py [--runs muon_cap1 ...] [--steps N] [--width N] [--folder DIR]
    python benchmarks/lipschitz_shakespeare.py --table [--into docs/lipschitz.md] [--plot docs/lipschitz.svg]

The experiment of Training Transformers with Enforced Lipschitz Constants (arXiv 2507.13338), on the model of
configs/variants/lipschitz.yaml: a norm-free transformer of 3 blocks and 4 heads, with the cap max_norm on
every hidden matrix after every update. Muon with the soft cap against AdamW with the exact cap, and one model
whose constant is below 10. Width and steps are the paper's, and with --length 256 --batch 64 its batches too;
those of the defaults take a CPU core ten minutes a run. Accuracy is that of the next character over all of
validation.txt. The certificate is `llmnorm certify`'s, with exact singular values of the saved weights, and
its attack.

A run that is finished is not run again, and one that was stopped goes on: start the command again. The JSON
grows run by run.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from tables import put_into

from llmnorm.config import load_run_config
from llmnorm.evaluation import describe_environment
from llmnorm.evaluation.loading import load_causal_lm, load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
RESULT = Path(__file__).parent / "results" / "lipschitz_shakespeare.json"
CONFIG = ROOT / "configs" / "variants" / "lipschitz.yaml"
SAMPLES = ROOT / "samples" / "tinyshakespeare"
MARK = "lipschitz shakespeare"
CAPS = (1.0, 2.0, 6.0)
ADAMW: dict[str, Any] = {"optimizer.name": "adamw", "optimizer.lr": 5e-3}
# Within its caps this model's constant is below 10, whatever it learns: a block's attention is 3-Lipschitz,
# as logits are over hidden_size and the output over sqrt(heads), its MLP 1-Lipschitz, so that three blocks
# have at most (5/6 + 3/6)^3 = 2.4, and the head 4, see `overrides`.
TIGHT: dict[str, Any] = {
    "model.attention_options": {"logits_over": "hidden_size", "output_factor": "inverse_sqrt_heads"},
    "model.weight_constraint": {"name": "spectral_soft_cap", "max_norm": 1.0},
}
RUNS: dict[str, dict[str, Any]] = {
    **{
        f"muon_cap{cap:g}": {"model.weight_constraint": {"name": "spectral_soft_cap", "max_norm": cap}}
        for cap in CAPS
    },
    **{
        f"adamw_cap{cap:g}": {
            **ADAMW,
            "model.weight_constraint": {"name": "spectral_cap", "max_norm": cap},
        }
        for cap in CAPS
    },
    "muon_below_10": TIGHT,
}


def overrides(name: str, size: dict[str, int], folder: Path) -> dict[str, Any]:
    """The keys by which a run differs from CONFIG."""
    steps, width = size["steps"], size["width"]
    shared = {
        "output_dir": str(folder / name),
        "model.hidden_size": width,
        "model.intermediate_size": 4 * width,
        "model.max_position_embeddings": size["length"],
        "data.sequence_length": size["length"],
        "data.train_files": str(SAMPLES / "train.txt"),
        "data.validation_files": str(SAMPLES / "validation.txt"),
        "train.global_batch_size": size["batch"],
        "train.max_steps": steps,
        "evaluation.every": None,
        "checkpoint.every": max(1, steps // 4),
        "export.at_end": True,
    }
    own = dict(RUNS[name])
    if name == "muon_below_10":
        # With rows of RMS 1 a difference of two logits moves by at most 2 sqrt(d) scale sqrt(d) RMS(dx).
        own["model.final_scale"] = 2.0 / width
    return {**shared, **own}


@torch.no_grad()
def accuracy(export: Path, length: int, factor: float = 1.0, batch: int = 32) -> dict[str, float]:
    """Of the next character over validation.txt in disjoint windows of `length`, and the mean loss of the
    logits times `factor`, which a Lipschitz constant scales with and the accuracy does not."""
    model, tokenizer = load_causal_lm(export), load_tokenizer(export)
    ids = tokenizer((SAMPLES / "validation.txt").read_text(encoding="utf-8"))["input_ids"]
    count = (len(ids) - 1) // length
    stream = torch.tensor(ids[: count * length + 1])
    inputs, targets = stream[:-1].view(count, length), stream[1:].view(count, length)
    right, loss = 0, 0.0
    for x, y in zip(inputs.split(batch), targets.split(batch), strict=True):
        logits = factor * model(input_ids=x, use_cache=False).logits
        right += int((logits.argmax(-1) == y).sum())
        loss += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum"))
    return {"accuracy": right / targets.numel(), "loss": loss / targets.numel()}


def certificate(export: Path, length: int) -> dict[str, Any]:
    """What is kept of the certificate: log10 of both norm pairs, the published recursion's, the attack's."""
    from llmnorm.evaluation.certificate import certify
    from llmnorm.evaluation.certificate_report import full_certificate
    from llmnorm.export.source import load_model

    model = load_model(export)
    numbers = full_certificate(model, certify(model), attack_steps=20, context_length=length)
    keys = ("log10_lipschitz", "log10_lower_bound", "formula", "norm_pair", "log10", "log10_lower")
    published = certify(model, formula="published").log10
    return {**{key: numbers.get(key) for key in keys}, "log10_published": published}


def loss_at_10(row: dict[str, Any], export: Path, length: int) -> float:
    """Loss with the logits multiplied so that their certified constant, root mean square, is 10."""
    return accuracy(export, length, 10.0 ** (1.0 - row["certificate"]["log10"]["logits_rms"]))["loss"]


class Results:
    """The JSON of all runs; written after each measurement."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content: dict[str, Any] = {"command": "python benchmarks/lipschitz_shakespeare.py", "runs": {}}
        if path.exists():
            self.content = json.loads(path.read_text())

    def find(self, name: str, size: dict[str, int]) -> dict[str, Any]:
        row = self.content["runs"].get(name, {})
        return row if row.get("size") == size else {}

    def put(self, name: str, row: dict[str, Any]) -> None:
        self.content["runs"][name] = row
        self.content["environment"] = describe_environment()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.content, indent=1) + "\n")


def trained(name: str, size: dict[str, int], folder: Path, results: Results) -> dict[str, Any]:
    """Train and score, unless it is done."""
    from llmnorm.training import train

    config = load_run_config(CONFIG, overrides(name, size, folder))
    export = folder / name / "export"
    row = results.find(name, size)
    if row:
        return row
    if not (export / "config.json").exists():
        train(config)
    steps = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    constraint = config.model.weight_constraint
    assert constraint is not None, CONFIG
    row = {
        "size": size,
        "optimizer": config.optimizer.name,
        "lr": config.optimizer.lr,
        "constraint": constraint.model_dump(exclude_none=True),
        "seconds": round(sum(step.get("seconds", 0.0) for step in steps), 1),
        "parameters": sum(p.numel() for p in load_causal_lm(export).parameters()),
        **accuracy(export, size["length"]),
    }
    results.put(name, row)
    return row


def table(content: dict[str, Any]) -> str:
    """One line for each run, from the smallest constant to the largest."""
    lines = [
        "| run | optimizer | cap | accuracy | loss | log10 L, logits' RMS | loss at L = 10 "
        "| log10 L, logit differences | found by attack | published recursion (no bound) |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, row in _sorted(content):
        proof, cap = row["certificate"], row["constraint"]["max_norm"]
        log10, published = proof["log10"], proof["log10_published"]
        lines.append(
            f"| {name} | {row['optimizer']} | {cap:g} | {100 * row['accuracy']:.1f} % | {row['loss']:.3f} "
            f"| {log10['logits_rms']:.2f} | {row['loss_at_10']:.4f} | {log10['logit_difference']:.2f} "
            f"| {proof['log10_lower_bound']:.2f} | {published['logits_rms']:.2f} |"
        )
    rows = list(content["runs"].values())
    size, environment = rows[0]["size"], content["environment"]
    lines += [
        "",
        f"{rows[0]['parameters']:,} parameters, width {size['width']}, {size['steps']} steps of "
        f"{size['batch']} x {size['length']} characters, one seed, one learning rate each (Muon "
        f"{_lr(content, 'muon')}, AdamW {_lr(content, 'adamw')}); fp32 on {environment['device']}, torch "
        f"{environment['torch']}, {environment['date']}. Attacks are on differences of logits.",
    ]
    return "\n".join(lines)


def _lr(content: dict[str, Any], optimizer: str) -> str:
    return " and ".join(
        sorted({f"{row['lr']:g}" for row in content["runs"].values() if row["optimizer"] == optimizer})
    )


def _sorted(content: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    rows = [(name, row) for name, row in content["runs"].items() if "loss_at_10" in row]
    return sorted(rows, key=lambda item: item[1]["certificate"]["log10"]["logits_rms"])


def plot(content: dict[str, Any], path: Path) -> None:
    """Accuracy against log10 L; one line for each optimizer."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "llmnorm"  # the same numbers, the same file
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6.4, 4.0), layout="constrained")
    for optimizer, mark, place, side in (
        ("muon", "o-", (-6, 5), "right"),
        ("adamw", "s--", (6, -11), "left"),
    ):
        points = [
            (
                row["certificate"]["log10"]["logits_rms"],
                100 * row["accuracy"],
                name.removeprefix(f"{optimizer}_"),
            )
            for name, row in _sorted(content)
            if row["optimizer"] == optimizer
        ]
        axis.plot([p[0] for p in points], [p[1] for p in points], mark, label=optimizer)
        for x, y, name in points:
            text = name.replace("cap", "cap ").replace("_", " ")
            axis.annotate(text, (x, y), textcoords="offset points", xytext=place, ha=side, fontsize=8)
    axis.margins(0.14)
    axis.set_xlabel("log10 of the certified Lipschitz constant (RMS to RMS)")
    axis.set_ylabel("accuracy of the next character, %")
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right")
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=RUNS)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--width", type=int, default=256, help="of the stream; the MLP is four times as wide")
    parser.add_argument("--length", type=int, default=64, help="characters of a sequence")
    parser.add_argument("--batch", type=int, default=8, help="sequences of a step")
    parser.add_argument("--folder", type=Path, default=Path("runs/lipschitz_shakespeare"))
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--table", action="store_true", help="print the table of the runs so far")
    parser.add_argument("--into", type=Path, help="with --table: the page of docs that holds it")
    parser.add_argument("--plot", type=Path, help="with --table: the picture to write")
    arguments = parser.parse_args()
    results = Results(arguments.output)
    if arguments.table:
        print(table(results.content))
        if arguments.into:
            put_into(arguments.into, MARK, table(results.content))
        if arguments.plot:
            plot(results.content, arguments.plot)
        return
    size = {key: getattr(arguments, key) for key in ("steps", "width", "length", "batch")}
    for name in arguments.runs:
        row = trained(name, size, arguments.folder, results)
        print(f"{name}: accuracy {row['accuracy']:.4f}, loss {row['loss']:.4f}", flush=True)
    for name in arguments.runs:
        row = trained(name, size, arguments.folder, results)
        if "certificate" not in row:
            proof = certificate(arguments.folder / name / "export", size["length"])
            results.put(name, {**row, "certificate": proof})
            print(f"{name}: log10 L {proof['log10']}", flush=True)
        row = results.find(name, size)
        if "loss_at_10" not in row:
            loss = loss_at_10(row, arguments.folder / name / "export", size["length"])
            results.put(name, {**row, "loss_at_10": loss})


if __name__ == "__main__":
    main()
