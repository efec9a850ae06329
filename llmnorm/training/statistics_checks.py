"""What a run with PowerNorm, Unified Norm or PRepBN may not ask for at the same time."""

from __future__ import annotations

from llmnorm.config import RunConfig
from llmnorm.errors import UserError
from llmnorm.modeling import LlmNormConfig
from llmnorm.modeling.norms import STATISTICS_NORMS


def check_statistics(config: RunConfig, model: LlmNormConfig) -> None:
    """Raise `UserError` for a setting that contradicts norms with running statistics; others pass."""
    rows = [model.norm] if isinstance(model.norm, str) else model.norm
    found = [row for row in rows if row in STATISTICS_NORMS]
    if not found:
        return
    if config.train.compile:
        raise UserError(
            f"train.compile=true does not go with model.norm={found[0]}: what it records of each batch is no "
            "part of a compiled graph; set train.compile: false"
        )
    if config.data.document_masking and model.norm_options["statistics"] == "batch":
        raise UserError(
            "data.document_masking=true keeps documents apart, and model.norm_options.statistics=batch joins "
            "all tokens of a batch; set model.norm_options.statistics to prefix or running, or "
            "data.document_masking: false"
        )
    if "prepbn" in found and config.model.init_from is None:
        _check_interpolation(config, model)


def _check_interpolation(config: RunConfig, model: LlmNormConfig) -> None:
    hold, interpolation = (model.norm_options[name] for name in ("hold_steps", "interpolation_steps"))
    steps = config.train.max_steps
    if hold + interpolation > steps:
        raise UserError(
            f"model.norm_options: hold_steps={hold} and interpolation_steps={interpolation} end after "
            f"{hold + interpolation} updates and train.max_steps={steps}, so the run would leave a norm "
            "between two norms, which does not fold; lower them, for example to hold_steps: 0 and "
            f"interpolation_steps: {max(1, 4 * steps // 5)}, four fifths of the run"
        )
