"""After the last update: the export, its upload, the report, and the list of what the run wrote."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from llmnorm.config import RunConfig
from llmnorm.evaluation import write_report
from llmnorm.export import export_checkpoint, push_to_hub
from llmnorm.training.processes import Processes
from llmnorm.training.run_directory import RunDirectory


def finish(
    config: RunConfig,
    directory: RunDirectory,
    tokenizer: PreTrainedTokenizerBase,
    processes: Processes,
    note: Callable[[str], None],
) -> list[Path]:
    """Export the newest checkpoint if asked, upload it if asked, write report.html; return the run's files.

    The main process works and the others wait. An upload that fails is noted and fails nothing.
    """
    if processes.is_main:
        if config.export.at_end:
            export_checkpoint(directory.path, directory.export, tokenizer=tokenizer)
        if config.export.push_to_hub is not None:
            status = push_to_hub(directory.export, config.export.push_to_hub, private=config.export.private)
            note(status.message)
        write_report(directory.path)
        note("wrote\n" + "\n".join(f"  {path}" for path in directory.overview()))
    processes.barrier()
    return directory.files()
