"""What a model is worth: perplexity, downstream tasks, and the report of a run."""

from llmnorm.evaluation.diagnostics import diagnose
from llmnorm.evaluation.environment import describe_environment
from llmnorm.evaluation.held_out import (
    HeldOutText,
    evaluate_dataset,
    evaluate_datasets,
    evaluation_metrics,
    held_out_numbers,
    read_held_out,
)
from llmnorm.evaluation.leak import FutureLeak, future_leak
from llmnorm.evaluation.legacy import galore_legacy
from llmnorm.evaluation.perplexity import PerplexityResult, Window, perplexity, windows
from llmnorm.evaluation.report import read_metrics, write_report

__all__ = [
    "FutureLeak",
    "HeldOutText",
    "PerplexityResult",
    "Window",
    "describe_environment",
    "diagnose",
    "evaluate_dataset",
    "evaluate_datasets",
    "evaluation_metrics",
    "future_leak",
    "galore_legacy",
    "held_out_numbers",
    "perplexity",
    "read_held_out",
    "read_metrics",
    "windows",
    "write_report",
]
