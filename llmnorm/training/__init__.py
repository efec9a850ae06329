"""The loop: `train(config)`. Its parts are modules of this folder; `plan` is used without the others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmnorm.training.loop import TrainingResult, train

__all__ = ["TrainingResult", "train"]


def __getattr__(name: str) -> Any:
    # Imported when first used: a dry run needs the plan and none of the trackers, loaders and exporters.
    if name not in __all__:
        raise AttributeError(f"module 'llmnorm.training' has no attribute {name!r}")
    from llmnorm.training import loop

    return getattr(loop, name)
