"""What a run looks at between its updates: held-out loss, text of its own, diagnostics of its layers.

Nothing here moves a weight or draws from the run's random numbers. Each look is written once per step: a run
that goes on does not repeat what its metrics already have.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llmnorm.config import RunConfig
from llmnorm.data.pipeline import PreparedData
from llmnorm.evaluation import evaluate_datasets, evaluation_metrics
from llmnorm.training.diagnosis import TrainingDiagnostics, Watch, for_trackers
from llmnorm.training.parallel import ParallelModel
from llmnorm.training.processes import Processes
from llmnorm.training.run_log import RunLog
from llmnorm.training.run_state import Position
from llmnorm.training.sampling import sample_text
from llmnorm.training.watchdog import Watchdog


class Observer:
    """Every process calls it alike. `evaluation` is the last evaluation row of this start."""

    def __init__(
        self,
        config: RunConfig,
        model: ParallelModel,
        data: PreparedData,
        processes: Processes,
        log: RunLog,
        watchdog: Watchdog,
        note: Callable[[str], None],
    ) -> None:
        self.config = config
        self.model = model
        self.data = data
        self.processes = processes
        self.log = log
        self.watchdog = watchdog
        self.note = note
        self.diagnostics = TrainingDiagnostics(config, model, data)
        self.evaluation: dict[str, Any] = {}

    def observe(self, position: Position) -> bool:
        """Evaluate and sample where this step asks for it; returns whether it took time."""
        evaluated = self._evaluation_due(position.step)
        if evaluated:
            self._evaluate(position)
        sampled = self._sample_due(position.step)
        if sampled:
            self._sample(position.step)
        return evaluated or sampled

    def watch(self, step: int) -> Watch | None:
        """What sees the gradients and weights of update `step`, where it is to be diagnosed."""
        return self.diagnostics.watch() if self.diagnostics.due(step) else None

    def diagnose_untrained(self) -> None:
        """What can be said of the model before its first update."""
        self.watchdog.at(0, "diagnosing", patient=True)
        if self.diagnostics.due(0) and not self.log.has(0, "diagnostics/stream_rms"):
            self._write_diagnosis(0, self.diagnostics.probe())

    def diagnose(self, step: int, watch: Watch) -> None:
        """Write what `watch` saw of update `step`, and what the streams are after it."""
        self.watchdog.at(step, "diagnosing", patient=True)
        self._write_diagnosis(step, watch.row())

    def _write_diagnosis(self, step: int, numbers: dict[str, Any]) -> None:
        row = {"step": step, **numbers}
        self.log.write(row, for_trackers(row, len(self.diagnostics.blocks)))

    def _evaluation_due(self, step: int) -> bool:
        """At the start, every `evaluation.every` steps and at the end."""
        options = self.config.evaluation
        last = step == self.config.train.max_steps
        periodic = options.every is not None and step % options.every == 0
        due = options.at_start if step == 0 else periodic or last
        return bool(self.data.validation) and due and not self.log.has(step, "eval/loss")

    def _evaluate(self, position: Position) -> None:
        step, options = position.step, self.config.evaluation
        self.watchdog.at(step, "evaluating", patient=True)
        results = evaluate_datasets(
            self.model.module,
            self.data.validation,
            context_length=options.context_length or self.config.data.sequence_length,
            stride=options.stride,
            batch_size=options.batch_size,
            max_tokens=options.max_tokens,
            rank=self.processes.rank,
            world_size=self.processes.world_size,
        )
        precision = next(iter(results.values())).dtype
        self.evaluation = {
            "step": step,
            "tokens": position.tokens,
            "eval/dtype": precision,
            **evaluation_metrics(results),
        }
        self.log.write(self.evaluation)
        for name, result in results.items():
            self.note(
                f"step {step}: {name} loss {result.loss:.4f}, perplexity {result.perplexity:.2f} "
                f"({result.tokens:,} tokens)"
            )

    def _sample_due(self, step: int) -> bool:
        every = self.config.train.sample_every
        return every is not None and step > 0 and step % every == 0 and not self.log.has(step, "sample")

    def _sample(self, step: int) -> None:
        train = self.config.train
        self.watchdog.at(step, "sampling", patient=True)
        seed = self.config.seed + step
        text = sample_text(self.model, self.data.tokenizer, train.sample_prompt, train.sample_tokens, seed)
        self.log.write({"step": step, "sample": text})
        self.note(f"step {step}, sampled: {text}")
