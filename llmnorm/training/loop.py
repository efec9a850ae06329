"""`train(config)`: a run from its config to its report, top to bottom.

processes -> run directory -> data -> model on the meta device -> sharded -> weights drawn, loaded or
restored -> optimizer -> [batch -> loss -> gradient -> guards -> update -> metrics -> checkpoint] ->
evaluate, export, report
"""

from __future__ import annotations

import atexit
import math
import random
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from llmnorm.checkpoint import CheckpointStore
from llmnorm.config import RunConfig, check_batch, check_batches
from llmnorm.data.loader import TrainingLoader, training_loader
from llmnorm.data.pipeline import prepare_data
from llmnorm.export import check_repo_id
from llmnorm.modeling.quantization import set_rounding_clock
from llmnorm.optim import (
    check_feasible,
    check_penalties,
    create_clipping,
    create_optimizer,
    create_schedule,
    format_routing_table,
    routing_table,
)
from llmnorm.plugins import load_run_plugins
from llmnorm.training.attention_backends import describe_attention, sdpa_order
from llmnorm.training.batch_size import create_batch_size, format_stages
from llmnorm.training.build import build_on_meta, choose_kernels, draw_blueprint, fill_weights, rebuild
from llmnorm.training.finish import finish
from llmnorm.training.fused_update import FusedUpdate, check_fused_backward
from llmnorm.training.guards import Guards, Verdict
from llmnorm.training.observation import Observer
from llmnorm.training.parallel import check_shards
from llmnorm.training.plan import check_model, flops_per_token, penalties_of
from llmnorm.training.processes import lost_process, resolve_strategy, start_processes
from llmnorm.training.progress import ProgressLine
from llmnorm.training.run_directory import RunDirectory
from llmnorm.training.run_log import RunLog
from llmnorm.training.run_state import RunState
from llmnorm.training.signals import StopRequest
from llmnorm.training.throughput import Throughput
from llmnorm.training.update import Measured, Update
from llmnorm.training.watchdog import Watchdog
from llmnorm.training.zero import parallel_model
from llmnorm.training.zero_checks import check_deepspeed, resolve_zero_stage


@dataclass(frozen=True)
class TrainingResult:
    """What a run left behind; `evaluation` is the last evaluation row, `loss` that of the last update."""

    output_dir: Path
    step: int
    tokens: int
    loss: float | None
    interrupted: bool
    evaluation: dict[str, Any] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)


def train(config: RunConfig) -> TrainingResult:
    """Train, or go on training, the run that `config` describes.

    Collective: every process that the launcher started calls it. A directory with checkpoints of this run
    is resumed from the newest intact one; every later step, tokens, loss, lr and grad_norm is then what it
    would have been without the interruption, to the last bit on a CPU. SIGTERM and SIGINT finish the step,
    save and return with `interrupted`.

    Raises `UserError` for every mistake a user can make, before anything is written wherever it can be
    known before, and `LostProcess` when another process of the run has died or does not answer.
    """
    run = None
    try:
        run = Training(config)
        result = run.run()
    except RuntimeError as error:
        where = f"after step {run.state.position.step}" if run else "before the first step"
        if lost := lost_process(error, where):
            raise lost from error
        raise
    finally:
        if run:
            run.progress.close()
            run.directory.release()
    if dist.is_initialized():
        atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())
    return result


class Training:
    """One run: the constructor sets everything up, `run` is the loop."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.processes = start_processes(config.train.hang_timeout)
        self.watchdog = Watchdog(
            config.train.hang_timeout,
            self.processes.rank,
            self.processes.world_size,
            self.processes.same(uuid.uuid4().hex),
        )
        self.kernels = choose_kernels(config.kernels, self.processes.device)
        strategy = resolve_strategy(config.parallel, config.train)
        if strategy == "deepspeed":
            check_deepspeed(config, resolve_zero_stage(config.parallel))
        if strategy == "fsdp2":
            check_shards(config.parallel, self.processes)
        check_batches(config, self.processes.world_size)
        check_fused_backward(config, strategy, self.processes.world_size)
        self.batch_size = create_batch_size(config, strategy)
        self.schedule = create_schedule(max_steps=config.train.max_steps, **config.schedule.model_dump())
        self.directory = RunDirectory(config)
        self.directory.check_schedule(self.schedule)
        self.plugins = load_run_plugins(config)
        if config.model.init_from is None:
            check_model(config, strategy)
        if config.export.push_to_hub is not None:
            check_repo_id(config.export.push_to_hub)
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed((config.seed + self.processes.rank) % 2**32)

        main = self.processes.is_main
        self.progress = ProgressLine(config.train.max_steps, log_every=config.train.log_every, enabled=main)
        self.data = prepare_data(
            config.data, config.seed, local_rank=self.processes.local_rank, progress=main
        )
        self.processes.barrier()  # another node may have more to prepare than this one
        checkpoint = self._set_up_model(strategy)
        self._set_up_logs(checkpoint)
        self.observer = Observer(
            config, self.model, self.data, self.processes, self.log, self.watchdog, self.progress.note
        )
        self.loss: float | None = None
        self._first = True
        self._announce(checkpoint)

    def _set_up_model(self, strategy: str) -> Path | None:
        """Model, optimizer and guards, new or as in the newest checkpoint; returns that checkpoint."""
        config = self.config
        blueprint = draw_blueprint(config, self.data.tokenizer, self.directory.checkpoints)
        self.data.check_vocabulary(blueprint.model_config.vocab_size)
        model = build_on_meta(blueprint.model_config, config)
        self.model = parallel_model(model, strategy, self.processes, config.train.precision, config.parallel)
        self.processes.agree(self.directory.claim() if self.processes.is_main else None)
        self.model.materialize()
        if self.processes.is_main:
            self.directory.create()
            self.data.tokenizer.save_pretrained(self.directory.tokenizer)
        self.processes.barrier()
        self.store = CheckpointStore(
            self.directory.checkpoints,
            keep=config.checkpoint.keep,
            keep_every=config.checkpoint.keep_every,
            asynchronous=config.checkpoint.asynchronous,
        )
        checkpoint = self.store.newest()
        if checkpoint is None:
            fill_weights(model, blueprint, config.seed)
        else:
            rebuild(model)
        self.optimizer = create_optimizer(
            config.optimizer.method, model, config.optimizer.lr, **config.optimizer.options(config.seed)
        )
        check_feasible(model, self.optimizer)
        self.routing = format_routing_table(routing_table(self.optimizer))
        self.guards = Guards(config.guards)
        train = config.train
        penalties = penalties_of(train)
        check_penalties(model, penalties)
        clipping = None
        if train.grad_clip is not None and train.grad_clip_mode != "global":
            clipping = create_clipping(train.grad_clip_mode, train.grad_clip)
        self.state = RunState(
            self.model, self.optimizer, self.guards, clipping, self.batch_size, self.plugins
        )
        self.model.connect(self.optimizer)
        if checkpoint is not None:
            self.state.restore(checkpoint)
        if config.optimizer.fused_backward:
            mode = train.grad_clip_mode
            self.update: Update = FusedUpdate(self.model, self.optimizer, train.grad_clip, clipping, mode)
        else:
            self.update = Update(self.model, self.optimizer, train.grad_clip, clipping, penalties)
        return checkpoint

    def _set_up_logs(self, checkpoint: Path | None) -> None:
        config, processes = self.config, self.processes
        flops = flops_per_token(self.model.module.config, config.data.sequence_length)  # type: ignore[arg-type]
        self.throughput = Throughput(
            processes.device, config.train.precision, processes.world_size, flops.total
        )
        position, resumed = self.state.position, checkpoint is not None
        self.log = RunLog(config, self.directory, processes, position, resumed, self.progress.note)

    def _announce(self, checkpoint: Path | None) -> None:
        processes, train, note = self.processes, self.config.train, self.progress.note
        for line in self.directory.notes():
            note(line)
        note(self.routing)
        for line in format_stages(self.config):
            note(line)
        note(
            f"{processes.world_size} x {processes.device.type} ({self.model.label}, {train.precision}), "
            f"{self._split(self._next_size())}"
        )
        note(self.kernels)
        note(
            describe_attention(
                self.model.module.config,  # type: ignore[arg-type]
                processes.device,
                torch.float32 if train.precision == "fp32" else torch.bfloat16,
                self.config.data.document_masking,
            )
        )
        note(self.throughput.explain())
        for line in self.state.changed_plugins:
            note(line)
        if checkpoint is not None:
            note(f"going on after step {self.state.position.step} from {checkpoint}")

    def _next_size(self) -> int:
        """Sequences of the next update, over all processes."""
        position = self.state.position
        return self.batch_size.at(position.step, position.data_position)

    def _split(self, size: int) -> str:
        processes = self.processes.world_size
        plan = check_batch(self.config, processes, size)
        return (
            f"{size} sequences per update = {plan.micro_batch_size} x {plan.accumulation_steps} x "
            f"{processes} (micro-batch x accumulation x processes)"
        )

    def run(self) -> TrainingResult:
        """Update until max_steps, or until a signal asks to stop."""
        if self.config.guards.spike is not None and self.state.position.step == 0:
            self._save()  # a spike before the first periodic checkpoint needs something to go back to
        self._read_on()
        with StopRequest() as stop, sdpa_order(self.processes.device), self.watchdog:
            if self.state.position.step == 0:
                self.observer.diagnose_untrained()
            self.throughput.start()
            stopped = False
            while not stopped:
                if self.observer.observe(self.state.position):
                    self.throughput.start()
                if self.state.position.step >= self.config.train.max_steps:
                    break
                stopped = self._step(stop)
            self._batches.close()
            self.watchdog.at(self.state.position.step, "saving", patient=True)
            self.store.wait()
        return self._finish(stopped, stop)

    def _step(self, stop: StopRequest) -> bool:
        """One update, or a roll-back; returns whether the run must stop here."""
        position, size = self.state.position, self._size
        first = self._first
        self._first = False
        self.watchdog.at(position.step + 1, "reading its data", patient=first)
        batch = next(self._batches)
        self.watchdog.at(position.step + 1, "computing", patient=first)
        set_rounding_clock(self.model.module, self.config.seed, position.step)
        reweighting = self.config.train.loss_reweighting
        watch = self.observer.watch(position.step + 1)
        measured = self.update.measure(
            batch.micro_batches,
            lambda: stop.received is not None,
            reweighting=reweighting if reweighting and position.step >= reweighting.warmup_steps else None,
            variance=self.batch_size.due(position.step),
            **({"see_gradients": watch.see_gradients} if watch else {}),
        )
        self.watchdog.at(position.step + 1, "updating weights", patient=first)
        samples = range(batch.first, batch.first + size)
        verdict = self.guards.judge(position.step + 1, measured.loss, measured.grad_norm, samples)
        if verdict is Verdict.ROLL_BACK:
            self._roll_back(samples, measured)
            return measured.stop_requested
        multiplier = self.schedule.multiplier(position.step) * self.batch_size.lr_factor(size)
        optimizer_seconds = None
        if verdict is Verdict.APPLY:
            if watch:
                watch.see_weights()
            timed = (position.step + 1) % self.config.train.log_every == 0
            optimizer_seconds = self.update.apply(multiplier, timed)
            if (norm := self.update.found_norm) is not None:
                measured = measured._replace(grad_norm=norm)
                verdict = self.guards.judge_gradient(position.step + 1, measured.loss, norm, samples)
            if measured.gradient_variance is not None:
                assert measured.grad_norm is not None
                self.batch_size.observe(measured.gradient_variance, measured.grad_norm)
        else:
            self.update.drop()
        position.step += 1
        position.tokens += measured.tokens
        position.data_position = samples.stop
        lr, skipped = self.config.optimizer.lr * multiplier, verdict is Verdict.SKIP
        self._record(measured, lr, skipped, optimizer_seconds)
        if watch:
            self.observer.diagnose(position.step, watch)
            self.throughput.start()
        last = position.step == self.config.train.max_steps
        if last or measured.stop_requested or position.step % self.config.checkpoint.every == 0:
            self._save()
        if not last and self._next_size() != size:
            self._batches.close()
            self._read_on()
            self.progress.note(f"from step {position.step + 1} on {self._split(self._size)}")
        return measured.stop_requested and not last

    def _read_on(self) -> None:
        """Read steps of the next update's size from the first sample that was not read, without end."""
        self._size = self._next_size()
        self._first = True  # data has to be found, and a new size to be compiled
        self._batches: TrainingLoader = training_loader(
            self.data.samples,
            start=self.state.position.data_position,
            global_batch_size=self._size,
            micro_batch_size=check_batch(self.config, self.processes.world_size, self._size).micro_batch_size,
            rank=self.processes.rank,
            world_size=self.processes.world_size,
            num_workers=self.config.data.num_workers,
            pin_memory=self.processes.device.type == "cuda",
        )

    def _record(self, measured: Measured, lr: float, skipped: bool, optimizer_seconds: float | None) -> None:
        """One metrics row for the step that has just been completed."""
        self.loss = measured.loss
        row: dict[str, Any] = {
            "step": self.state.position.step,
            "tokens": self.state.position.tokens,
            "loss": measured.loss,
            "lr": lr,
            "grad_norm": math.nan if measured.grad_norm is None else measured.grad_norm,
            **self.throughput.measure(measured.tokens),
        }
        if self.config.train.batch_schedule is not None:
            row["global_batch_size"] = self._size
        for name in ("gradient_variance", "weight_entropy"):
            if (number := getattr(measured, name)) is not None:
                row[name] = number
        if optimizer_seconds is not None:
            row["optimizer_seconds"] = optimizer_seconds
        if skipped:
            row["skipped"] = True
        self.log.write(row)
        self.progress.update(row)

    def _save(self) -> None:
        self.watchdog.at(self.state.position.step, "saving", patient=True)
        self.log.sync()
        self.state.save(self.store, self.config.to_yaml())

    def _roll_back(self, samples: range, measured: Measured) -> None:
        """Return to the newest checkpoint, and read on behind the samples that were read since it."""
        self.watchdog.at(self.state.position.step, "rolling back", patient=True)
        self.update.drop()
        spiked = self.state.position.step + 1
        rollbacks = self.guards.rollbacks
        checkpoint = self.store.newest()
        assert checkpoint is not None, "a run with guards.spike saves a checkpoint before its first step"
        self.state.restore(checkpoint)
        position = self.state.position
        skipped = range(position.data_position, samples.stop)
        position.data_position = samples.stop
        self.guards.rollbacks = rollbacks
        self.store.discard_newer(position.step)
        self.log.cut_after(position.step)
        event = {"event": "roll_back", "spike_step": spiked, "spike_loss": measured.loss}
        read_and_skipped = [skipped.start, skipped.stop - 1]
        self.log.write({"step": position.step, **event, "skipped_samples": read_and_skipped})
        self.progress.note(
            f"loss {measured.loss:.4f} at step {spiked} is a spike: back to step {position.step}, and "
            f"training samples {skipped.start} to {skipped.stop - 1} are skipped (roll-back {rollbacks})"
        )
        self._batches.close()
        self._read_on()

    def _finish(self, stopped: bool, stop: StopRequest) -> TrainingResult:
        """Say where the run stands; after the last step export it and write its report."""
        position = self.state.position
        self.log.close()
        self.progress.close()
        if stopped:
            self.progress.note(
                f"stopped by {stop.received or 'a signal to another process'} after step {position.step}, "
                f"which is saved in {self.directory.checkpoints}; start the same command again to go on"
            )
            files = []
        else:
            files = finish(
                self.config, self.directory, self.data.tokenizer, self.processes, self.progress.note
            )
        return TrainingResult(
            output_dir=self.directory.path,
            step=position.step,
            tokens=position.tokens,
            loss=self.loss,
            interrupted=stopped,
            evaluation=self.observer.evaluation,
            files=files,
        )
