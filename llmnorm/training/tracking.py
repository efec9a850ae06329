"""Trackers besides metrics.jsonl: TensorBoard, Weights & Biases and trackio, through Accelerate's classes.

Only the main process has trackers. A tracker that cannot start is the user's mistake; one that fails later
(a network, a full disk) is reported once and dropped, because a log must never kill a run.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmnorm.config import TensorBoardSection, TrackerSection, TrackioSection, WandbSection
from llmnorm.config.dotted import flatten
from llmnorm.errors import UserError


def _tensorboard(section: TensorBoardSection, run_dir: Path, run_id: str, step: int) -> Any:
    from accelerate.tracking import TensorBoardTracker

    # Steps from here on may be in the file of an earlier, killed process.
    return TensorBoardTracker(run_name="tensorboard", logging_dir=str(run_dir), purge_step=step + 1)


def _wandb(section: WandbSection, run_dir: Path, run_id: str, step: int) -> Any:
    from accelerate.tracking import WandBTracker

    return WandBTracker(
        run_name=section.project,
        name=section.run_name or run_dir.name,
        entity=section.entity,
        mode=section.mode,
        id=run_id,
        resume="allow",
        dir=str(run_dir),
    )


def _trackio(section: TrackioSection, run_dir: Path, run_id: str, step: int) -> Any:
    from accelerate.tracking import TrackioTracker

    name = section.run_name or run_dir.name
    return TrackioTracker(run_name=section.project, name=f"{name}-{run_id}", resume="allow")


TRACKERS: dict[str, Callable[..., Any]] = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio}


class Trackers:
    """The trackers that a run asked for, behind one `log`."""

    def __init__(
        self,
        sections: Sequence[TrackerSection],
        run_dir: Path,
        run_id: str,
        step: int,
        config: Mapping[str, Any],
        note: Callable[[str], None],
    ) -> None:
        """`run_id` names the run across restarts; `step` is the one it goes on from."""
        self._note = note
        self._trackers: dict[str, Any] = {}
        for section in sections:
            name = section.name
            if importlib.util.find_spec(name) is None:
                raise UserError(
                    f"tracking lists {name}, which is not installed; `pip install {name}`, or remove it "
                    "from tracking"
                )
            try:
                tracker = TRACKERS[name](section, run_dir, run_id, step)
                tracker.start()
                tracker.store_init_configuration(_plain(config))
            except Exception as error:
                raise UserError(
                    f"the tracker {name} did not start ({type(error).__name__}: {error}); mend its set-up, "
                    "or remove it from tracking"
                ) from error
            self._trackers[name] = tracker

    def log(self, row: Mapping[str, Any]) -> None:
        """Send the numbers of one metrics row."""
        numbers = {
            key: value
            for key, value in row.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool) and key != "step"
        }
        self._each(lambda tracker: tracker.log(numbers, step=row["step"]))

    def close(self) -> None:
        self._each(lambda tracker: tracker.finish())

    def _each(self, action: Callable[[Any], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                action(tracker)
            except Exception as error:
                del self._trackers[name]
                reason = f"{type(error).__name__}: {error}"
                self._note(f"warning: the tracker {name} failed and is dropped ({reason})")


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys and plain values, the only kind that every tracker stores."""
    flat = {key: value for key, value in flatten(config).items() if value != {}}
    return {
        key: value if isinstance(value, (bool, int, float, str)) else str(value)
        for key, value in flat.items()
    }
