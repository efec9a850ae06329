"""What each layer of a Hugging Face causal language model does: docs/diagnostics.md.

python eval/diagnose.py --model DIR --data FILE [--context-length 256] [--json OUT] [--plots DIR]

Streams, attention, gradients, gains, and the loss without each layer. The update-to-weight ratio comes from
the record of the run that trained the model, which is found beside an export or named with --run.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from llmnorm.errors import UserError, exit_on_user_error
from llmnorm.evaluation import diagnose, read_held_out
from llmnorm.evaluation.diagnostics import check_windows, recorded_update_ratio
from llmnorm.evaluation.diagnostics_plots import require_matplotlib, write_plots
from llmnorm.evaluation.diagnostics_table import layer_table
from llmnorm.evaluation.loading import check_model_folder, load_causal_lm, load_tokenizer


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, help="folder of a Hugging Face causal language model")
    add("--data", required=True, metavar="FILE", help="text, jsonl, parquet, or a prepared folder")
    add("--tokenizer", help="folder of the tokenizer (default: the model's)")
    add("--context-length", type=int, default=256, help="tokens per window (default: 256)")
    add("--batch-size", type=int, default=8, help="windows per forward pass (default: 8)")
    add("--max-tokens", type=int, default=2**18, help="tokens for streams and attention (default: 262144)")
    add("--gradient-batches", type=int, default=16, help="batches to average gradients over (default: 16)")
    add(
        "--removal-tokens",
        type=int,
        default=2**16,
        help="tokens scored without each layer (default: 65536)",
    )
    add("--no-removal", action="store_true", help="leave out the loss without each layer, the slowest part")
    add("--run", type=Path, help="run directory that recorded the update ratio (default: the model's parent)")
    add(
        "--text-field",
        default="text",
        help="key or column of a document (default: text)",
    )
    add("--append-eos", action="store_true", help="EOS after each document, as in training")
    add("--trust-remote-code", action="store_true", help="run code in the model's folder (ours runs anyway)")
    add("--json", type=Path, metavar="OUT", help="write every number here")
    add("--plots", type=Path, metavar="DIR", help="write one PNG per subject and overview.png here")
    return parser.parse_args()


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    check_model_folder(arguments.model)
    if arguments.run is not None and not (arguments.run / "metrics.jsonl").is_file():
        raise UserError(f"--run {arguments.run} has no metrics.jsonl; give the output_dir of a run.")
    tokenizer = load_tokenizer(arguments.tokenizer or arguments.model, arguments.trust_remote_code)
    text = read_held_out(
        arguments.data, tokenizer, text_field=arguments.text_field, append_eos=arguments.append_eos
    )
    model = load_causal_lm(arguments.model, trust_remote_code=arguments.trust_remote_code)
    check_windows(model, text.num_tokens, arguments.context_length)
    numbers = diagnose(
        model,
        text,
        arguments.context_length,
        batch_size=arguments.batch_size,
        max_tokens=arguments.max_tokens,
        gradient_batches=arguments.gradient_batches,
        removal=not arguments.no_removal,
        removal_tokens=arguments.removal_tokens,
        progress=show_progress,
    )
    norm = getattr(model.config, "norm", None)
    run = arguments.run or arguments.model.resolve().parent
    about = {"model": str(arguments.model), "model_type": model.config.model_type, "norm": norm}
    return {**about, **numbers, **recorded_update_ratio(run)}


def check_outputs(arguments: argparse.Namespace) -> None:
    """Refuse what could not be written before anything is measured."""
    if arguments.json and not arguments.json.resolve().parent.is_dir():
        raise UserError(f"--json {arguments.json} cannot be written: its folder does not exist.")
    if arguments.plots:
        require_matplotlib()
        if arguments.plots.exists() and not arguments.plots.is_dir():
            raise UserError(f"--plots {arguments.plots} is a file; give a folder.")


def show_progress(what: str, done: int, of: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{what}: {done} of {of} batches ", end="\n" if done == of else "", file=sys.stderr)


def main() -> None:
    arguments = parse()
    check_outputs(arguments)
    numbers = measure(arguments)
    print(layer_table(numbers))
    try:
        if arguments.json:
            arguments.json.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
        if arguments.plots:
            for path in write_plots(numbers, arguments.plots):
                print(f"wrote {path}")
    except OSError as error:
        raise UserError(f"{error.filename} cannot be written: {error.strerror or error}.") from error


if __name__ == "__main__":
    with exit_on_user_error():
        main()
