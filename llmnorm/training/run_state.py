"""What survives a restart, and how it goes into a checkpoint and comes back.

Weights, optimizer state, the update counter (which is also the schedule's state), the data position, the
random state of every process, the window of the guards, and the batch size that a norm test has reached.
Nothing else exists.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from torch.optim import Optimizer

from llmnorm.checkpoint import CheckpointStore, read_state, restore_rng, rng_tensors
from llmnorm.optim import Clipping
from llmnorm.plugins import Plugin, changed_plugins
from llmnorm.training.batch_size import BatchSize
from llmnorm.training.guards import Guards
from llmnorm.training.parallel import ParallelModel


@dataclass
class Position:
    """Where a run is: updates made, valid tokens seen, first training sample not yet read."""

    step: int = 0
    tokens: int = 0
    data_position: int = 0
    run_id: str = field(default_factory=lambda: uuid.uuid4().hex[:12])


class RunState:
    """The changing parts of a run, saved and restored together."""

    def __init__(
        self,
        model: ParallelModel,
        optimizer: Optimizer,
        guards: Guards,
        clipping: Clipping | None = None,
        batch_size: BatchSize | None = None,
        plugins: Sequence[Plugin] = (),
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.guards = guards
        self.clipping = clipping
        self.batch_size = batch_size
        self.plugins = plugins
        self.changed_plugins: list[str] = []
        self.position = Position()

    def save(self, store: CheckpointStore, config_yaml: str) -> Path:
        """Write the checkpoint of the current step (in the background if the store is asynchronous)."""
        module = self.model.module
        store.wait()  # the last save may still be talking
        tensors, optimizer_state = self.model.tensors(self.optimizer, store.ranks)
        tensors |= rng_tensors(self.model.processes.rank)
        model_config = module.config.to_dict()  # type: ignore[union-attr, operator]
        state = {
            **asdict(self.position),
            "guards": self.guards.state(),
            "clipping": self.clipping.state() if self.clipping else {},
            "batch_size": self.batch_size.state() if self.batch_size else {},
            "optimizer": optimizer_state,
            "model_config": model_config,
            "plugins": {plugin.name: plugin.sha256 for plugin in self.plugins},
        }
        files = {"config.yaml": config_yaml, "model_config.json": json.dumps(model_config, indent=2) + "\n"}
        files |= {plugin.name: plugin.text for plugin in self.plugins}
        return store.save(self.position.step, tensors, state, files)

    def restore(self, checkpoint: Path) -> None:
        """Take over everything from `checkpoint`, which any number of processes may have saved."""
        self.model.restore(self.optimizer, checkpoint)
        restore_rng(checkpoint, self.model.processes.rank)
        state = read_state(checkpoint)
        self.guards.restore(state["guards"])
        if self.clipping:
            self.clipping.restore(state["clipping"])
        if self.batch_size:
            self.batch_size.restore(state.get("batch_size", {}))  # absent before there were batch schedules
        self.changed_plugins = changed_plugins(state.get("plugins", {}), self.plugins)
        self.position = Position(**{name: state[name] for name in Position.__dataclass_fields__})
