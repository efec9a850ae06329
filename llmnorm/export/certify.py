"""`llmnorm certify`: the Lipschitz certificate of a run or an export, saved beside it and in its card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmnorm.errors import UserError
from llmnorm.evaluation.certificate import certify
from llmnorm.evaluation.certificate_report import (
    CERTIFICATE,
    certificate_section,
    certificate_table,
    full_certificate,
)
from llmnorm.evaluation.environment import describe_environment
from llmnorm.evaluation.held_out import read_held_out
from llmnorm.export.card import with_section
from llmnorm.export.hf import is_export
from llmnorm.export.source import export_source, load_model

ATTACK_TEXTS, ATTACK_TOKENS = 4, 16


def certify_checkpoint(
    source: str | Path,
    *,
    data: str | None = None,
    json_file: str | Path | None = None,
    formula: str = "per_head",
    radius: float | None = None,
    attack_steps: int = 30,
    context_length: int = 256,
    max_tokens: int = 8192,
    seed: int = 0,
) -> str:
    """Certify what `source` holds, as `certify` does, write certificate.json there, and return the table.

    source: a run directory (its newest intact checkpoint), one of its checkpoints/step_N, or an export,
    whose card then says it too. data: text for certified radii, and for attacks to start from. A formula
    that is no bound is shown and written to `json_file` alone.

    Raises UserError, NoCertificate among them, before anything is written.
    """
    source = Path(source).expanduser()
    if attack_steps < 0:
        raise UserError(f"--attack-steps {attack_steps} must be 0 (no attack) or more.")
    text = starts = None
    if data is None:
        model = load_model(source)
    else:
        loaded = export_source(source)
        model, text = loaded.model, read_held_out(data, loaded.tokenizer)
        starts = _starts(text)
    certificate = certify(model, formula=formula, radius_rms=radius)
    numbers = full_certificate(
        model,
        certificate,
        text,
        attack_texts=starts,
        attack_steps=attack_steps,
        context_length=context_length,
        max_tokens=max_tokens,
        seed=seed,
    )
    numbers["environment"] = describe_environment()
    folder = source.parent.parent if source.parent.name == "checkpoints" else source
    places = [] if json_file is None else [Path(json_file).expanduser()]
    if formula == "per_head":
        places.append(folder / CERTIFICATE)
    for place in places:
        _write(place, json_text(numbers))
    card = folder / "README.md"
    if formula == "per_head" and is_export(folder) and card.exists():
        _write(card, with_section(card.read_text(encoding="utf-8"), certificate_section(numbers)))
    return "\n".join([certificate_table(numbers), *(f"wrote {place}" for place in places)])


def json_text(numbers: dict[str, Any]) -> str:
    return json.dumps(numbers, indent=2) + "\n"


def _starts(text: Any) -> torch.Tensor | None:
    """[ATTACK_TEXTS, ATTACK_TOKENS] from the beginning of a text, if it is that long."""
    count = min(ATTACK_TEXTS, text.num_tokens // ATTACK_TOKENS)
    if count < 1:
        return None
    ids = np.asarray(text.read(0, count * ATTACK_TOKENS), dtype=np.int64)
    return torch.from_numpy(ids).view(count, ATTACK_TOKENS)


def _write(path: Path, content: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror or error}; name another place."
        ) from error
