"""20 losses of the 2m model in training, for every norm and every attention; `python
tests/oracles/golden_losses.py` writes them.

Hidden 128, FFN 352, 6 layers, 4 heads over 2 key-value heads; the bytes of the bundled Shakespeare text as
tokens; batches of 4 x 64 drawn with seed 0; AdamW without weight decay at 1e-3, or at the rate in RATES. A
change that should not alter numbers leaves the committed losses as they are; one that should is shown by the
difference.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from llmnorm.modeling import PRESETS, LlmNormConfig, LlmNormForCausalLM, initialize_weights
from llmnorm.optim import project_weights

TEXT = Path(__file__).parents[2] / "samples" / "tinyshakespeare" / "train.txt"
LOSSES = Path(__file__).with_name("golden_losses.json")
ATTENTION_LOSSES = LOSSES.with_name("golden_attention_losses.json")
STEPS, BATCH, LENGTH = 20, 4, 64
ATTENTIONS: dict[str, dict[str, Any]] = {
    "nalaformer": {"attention": "nalaformer"},
    "nalaformer_cosine": {"attention": "nalaformer", "attention_options": {"feature_map": "cosine"}},
    "relu": {"attention": "nalaformer", "attention_options": {"feature_map": "relu"}},
    "sla": {"attention": "sla"},
    "hybrid": {"attention": {"softmax_every": 3}},
    "off_by_one": {"attention_options": {"normalizer": "off_by_one", "gate": "head"}},
    "lipschitz": {"norm": "convex", "architecture": "lipschitz"},
    "sigmoid": {"attention_options": {"normalizer": "sigmoid", "gate": "elementwise"}},
}
RATES = {"ngpt": 1e-2}  # logits start below 1 and have to grow
INITS = {"convex": "orthogonal"}  # no norm makes up for small weights


def losses(norm: str = "pre_rmsnorm", **changes: Any) -> list[float]:
    """The training loss before each of 20 updates."""
    data = torch.frombuffer(bytearray(TEXT.read_bytes()), dtype=torch.uint8).long()
    config = LlmNormConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        norm=norm,
        **{"init": INITS.get(norm), **changes},
    )
    model = LlmNormForCausalLM(config)
    initialize_weights(model, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATES.get(norm, 1e-3), weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    history = []
    for _ in range(STEPS):
        starts = torch.randint(0, len(data) - LENGTH - 1, (BATCH, 1), generator=generator)
        window = data[starts + torch.arange(LENGTH + 1)]
        loss = model(window[:, :-1], shift_labels=window[:, 1:], use_cache=False).loss
        loss.backward()
        optimizer.step()
        project_weights(model)
        optimizer.zero_grad()
        history.append(loss.item())
    return history


def write(path: Path, golden: dict[str, list[float]]) -> None:
    """One row for each history, to the sixth digit."""
    rounded = {name: [round(loss, 6) for loss in history] for name, history in golden.items()}
    rows = ",\n".join(f'  "{name}": {json.dumps(history)}' for name, history in rounded.items())
    path.write_text("{\n" + rows + "\n}\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    write(LOSSES, {norm: losses(norm) for norm in PRESETS})
    write(ATTENTION_LOSSES, {name: losses(**changes) for name, changes in ATTENTIONS.items()})
