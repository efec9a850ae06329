"""From a YAML file and dotted overrides to a `RunConfig`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from llmnorm.config.schema import RunConfig


def load_run_config(path: str | Path | None, overrides: Sequence[str] | Mapping[str, Any] = ()) -> RunConfig:
    values: dict[str, Any] = yaml.safe_load(Path(path).read_text()) if path is not None else {}
    return RunConfig.model_validate(values)
