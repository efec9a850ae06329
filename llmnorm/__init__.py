"""llmnorm: pre-train LLaMA-style language models whose architecture, precision and optimizer are one YAML.

The names below are the public surface; each is imported when first used, so `import llmnorm` stays cheap.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "LlmNormConfig": "llmnorm.modeling",
    "LlmNormModel": "llmnorm.modeling",
    "LlmNormForCausalLM": "llmnorm.modeling",
    "create_optimizer": "llmnorm.optim",
    "load_run_config": "llmnorm.config",
    "RunConfig": "llmnorm.config",
    "perplexity": "llmnorm.evaluation",
    "export_checkpoint": "llmnorm.export",
    "fold_to_stock": "llmnorm.export",
    "NotFoldableError": "llmnorm.export",
    "UserError": "llmnorm.errors",
}
__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'llmnorm' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
