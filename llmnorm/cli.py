"""The `llmnorm` command: everything around a training run that is not training."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from llmnorm.errors import UserError, exit_on_user_error

Parser = argparse.ArgumentParser
Options = argparse.Namespace
Words = list[str]


def _config_arguments(parser: Parser) -> None:
    parser.add_argument("--config", required=True, metavar="FILE", help="the run, as YAML")
    parser.epilog = (
        "Keys of the file are overridden as --section.key VALUE; `python train.py --help` lists them."
    )


def _prepare(options: Options, overrides: Words) -> None:
    """Train or load the tokenizer and tokenize the run's text, so that training starts at once."""
    from llmnorm.config import load_run_config

    config = load_run_config(options.config, overrides)
    if config.data.streaming:
        raise UserError(
            "data.streaming=true reads text as it trains, so there is nothing to prepare; set "
            "data.streaming: false"
        )
    from llmnorm.data import prepare_data

    data = prepare_data(config.data, config.seed)
    print(f"tokenizer: {len(data.tokenizer):,} ids")
    for name, dataset in {"training": data.train, **data.validation}.items():
        print(f"{name}: {dataset.num_tokens:,} tokens of {dataset.num_documents:,} documents")


def _plan_arguments(parser: Parser) -> None:
    _config_arguments(parser)
    parser.add_argument("--processes", type=_positive, metavar="N", help="plan for this many processes")


def _plan(options: Options, overrides: Words) -> None:
    """Print the resolved config, parameters, memory, FLOPs, tokens and steps of a run."""
    from llmnorm.config import load_run_config

    config = load_run_config(options.config, overrides)
    from llmnorm.training.plan import print_plan

    print_plan(config, options.processes)


def _export_arguments(parser: Parser) -> None:
    parser.add_argument("source", type=Path, help="a run directory, one of its checkpoints, or an export")
    parser.add_argument("output", type=Path, nargs="?", help="folder to write (default: export/ of the run)")
    parser.add_argument(
        "--format",
        choices=("hf", "stock", "folded"),
        default="hf",
        help="our classes; stock ones; ours without their running norms",
    )
    parser.add_argument(
        "--stock-class", metavar="NAME", help="which one, as llama (default: the first that fits)"
    )
    parser.add_argument("--dequantize", action="store_true", help="a 4-bit model as an ordinary one")
    parser.add_argument("--tokenizer", metavar="DIR", help="folder of the tokenizer (default: the run's)")
    parser.add_argument("--push-to-hub", metavar="REPO", help="then upload it to owner/name")
    parser.add_argument("--public", action="store_true", help="create the repository public, not private")


def _export(options: Options, overrides: Words) -> None:
    """Write a Hugging Face repository whose logits are checked, and upload it if asked."""
    from llmnorm.export import check_repo_id, export_checkpoint, is_export, push_to_hub

    if options.public and not options.push_to_hub:
        raise UserError(
            "--public does nothing without --push-to-hub; add --push-to-hub owner/name or remove it"
        )
    if options.push_to_hub:
        check_repo_id(options.push_to_hub)
    if options.output is None and is_export(options.source):
        if not options.push_to_hub:
            raise UserError(
                f"{options.source} is an export already; give --push-to-hub owner/name to upload it, or a "
                "folder to write a copy"
            )
        folder = options.source
    else:
        tokenizer = None
        if options.tokenizer is not None:
            from llmnorm.evaluation.loading import load_tokenizer

            tokenizer = load_tokenizer(options.tokenizer)
        folder = options.output or _run_directory(options.source) / "export"
        choices = {
            "format": options.format,
            "stock_class": options.stock_class,
            "dequantize": options.dequantize,
        }
        folder = export_checkpoint(options.source, folder, tokenizer=tokenizer, **choices)
        print(f"wrote {folder}")
    if options.push_to_hub:
        status = push_to_hub(folder, options.push_to_hub, private=not options.public)
        if not status.uploaded:
            raise UserError(status.message)
        print(status.message)


def _convert_arguments(parser: Parser) -> None:
    parser.add_argument("--to", required=True, choices=("pre_rmsnorm", "pre_crmsnorm"), help="the new norm")
    parser.add_argument(
        "source", type=Path, help="a run directory, one of its checkpoints, or a model folder"
    )
    parser.add_argument("output", type=Path, help="folder to write, which must not exist")


def _convert(options: Options, overrides: Words) -> None:
    """Turn a Pre-LN model into its exact equivalent with RMSNorm or CRMSNorm."""
    from llmnorm.export import convert_checkpoint

    conversion = convert_checkpoint(options.source, options.output, options.to)
    print(f"wrote {conversion.output}; its logits differ by {conversion.difference:.1e} of the largest one")
    for note in conversion.notes:
        print(f"note: {note}")
    go_on = f"python train.py --config {conversion.output / 'config.yaml'} goes on training"
    print(go_on if conversion.resumes else f"model.init_from: {conversion.output} starts from these weights")


def _run_directory(source: Path) -> Path:
    """The run that a source belongs to; a checkpoint lies two folders below it."""
    return source.parent.parent if source.parent.name == "checkpoints" else source


def _sample_arguments(parser: Parser) -> None:
    parser.add_argument("--model", type=Path, required=True, help="an exported model, or a run directory")
    parser.add_argument("--prompt", default="", help="text to continue (default: none)")
    parser.add_argument(
        "--max-new-tokens", type=_positive, default=128, metavar="N", help="length (default: 128)"
    )
    parser.add_argument(
        "--temperature",
        type=_temperature,
        default=0.8,
        metavar="X",
        help="0: most likely token (default: 0.8)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the drawing (default: 0)")


def _sample(options: Options, overrides: Words) -> None:
    """Print a paragraph that the model continues from the prompt."""
    import torch

    from llmnorm.evaluation.loading import load_causal_lm, load_tokenizer

    exported = options.model / "export"
    folder = exported if (exported / "config.json").exists() else options.model
    model, tokenizer = load_causal_lm(folder), load_tokenizer(folder)
    ids = tokenizer.encode(options.prompt, add_special_tokens=False) or [tokenizer.eos_token_id]
    inputs = torch.tensor([ids], device=model.device)
    drawing = {"do_sample": True, "temperature": options.temperature, "top_k": 0}
    torch.manual_seed(options.seed)
    output = model.generate(  # type: ignore[operator]
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=options.max_new_tokens,
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        **(drawing if options.temperature > 0 else {"do_sample": False}),
    )
    print(tokenizer.decode(output[0], skip_special_tokens=True))


def _certify_arguments(parser: Parser) -> None:
    parser.add_argument(
        "source", type=Path, metavar="DIR", help="a run directory, one checkpoint, or an export"
    )
    parser.add_argument("--data", metavar="FILE", help="text whose certified radii are measured")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the numbers here too")
    parser.add_argument(
        "--formula", default="per_head", help="per_head, or published for comparison, which is no bound"
    )
    parser.add_argument("--radius", type=float, metavar="X", help="RMS of embeddings (default: the largest)")
    parser.add_argument(
        "--attack-steps", type=int, default=30, metavar="N", help="of the lower bound; 0: none (30)"
    )
    parser.add_argument("--context-length", type=_positive, default=256, metavar="N", help="of --data (256)")
    parser.add_argument("--max-tokens", type=_positive, default=8192, metavar="N", help="of --data (8192)")
    parser.add_argument("--seed", type=int, default=0, help="of the attack (0)")


def _certify(options: Options, overrides: Words) -> None:
    """Bound how far a model's logits move when its embeddings do, and save certificate.json beside it."""
    from llmnorm.export.certify import certify_checkpoint

    names = ("data", "formula", "radius", "attack_steps", "context_length", "max_tokens", "seed")
    choices = {name: getattr(options, name) for name in names}
    print(certify_checkpoint(options.source, json_file=options.json, **choices))


def _report_arguments(parser: Parser) -> None:
    parser.add_argument("run_dir", type=Path, help="a run directory, finished or not")


def _report(options: Options, overrides: Words) -> None:
    """Write report.html, one page with the run's curves and numbers."""
    from llmnorm.evaluation import write_report

    print(f"wrote {write_report(options.run_dir)}")


def _compare_arguments(parser: Parser) -> None:
    parser.add_argument("files", nargs="*", metavar="YAML", help="one study, or two or more run configs")
    parser.add_argument("--output_dir", type=Path, metavar="DIR", help="folder of the runs and the results")
    parser.add_argument("--lrs", type=float, nargs="+", metavar="X", help="learning rates to try")
    parser.add_argument("--sweep-steps", type=int, metavar="N", help="steps of a run that tries one (150)")
    parser.add_argument("--seeds", type=int, metavar="N", help="seeds at the best rate (3)")
    parser.add_argument("--steps", type=int, metavar="N", help="steps of the measured runs (400)")
    parser.add_argument("--equal", choices=("tokens", "time"), help="what variants get alike (tokens)")
    parser.add_argument("--baseline", metavar="NAME", help="what the others are compared with (the first)")
    parser.add_argument("--jobs", type=_positive, default=1, metavar="N", help="runs at a time (1)")
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="keys of every run, as section.key=value",
    )
    parser.add_argument("--no-interval", action="store_true", help="means only, which one seed suffices for")
    parser.add_argument("--keep-checkpoints", action="store_true", help="of finished runs (default: delete)")
    parser.add_argument("--retry-failed", action="store_true", help="start failed runs again from nothing")
    parser.add_argument("--list", action="store_true", help="show what has not run, and run nothing")
    parser.add_argument("--render", type=Path, metavar="JSON", help="print a results.json as Markdown")
    parser.add_argument("--into", type=Path, metavar="FILE", help="with --render: between its marks in FILE")


def _compare(options: Options, overrides: Words) -> None:
    """Train variants at their best learning rate on the same seeds and data, and say what differs."""
    if options.render is not None:
        _render_comparison(options)
        return
    if options.into is not None:
        raise UserError("--into does nothing without --render; add --render results.json or remove it")
    if options.output_dir is None:
        raise UserError("--output_dir is required; give a folder such as --output_dir runs/compare/norms_2m")
    from llmnorm.evaluation.compare import compare, list_runs

    names = ("lrs", "sweep_steps", "seeds", "steps", "equal", "baseline")
    study: dict[str, Any] = {name: getattr(options, name) for name in names}
    study |= {"changes": options.set, "interval": not options.no_interval}
    if options.list:
        list_runs(options.files, options.output_dir, **study)
        return
    finished = compare(
        options.files,
        options.output_dir,
        jobs=options.jobs,
        keep_checkpoints=options.keep_checkpoints,
        retry_failed=options.retry_failed,
        command=shlex.join(["llmnorm", *options.words]),
        **study,
    )
    if not finished:
        sys.exit(1)


def _render_comparison(options: Options) -> None:
    """Markdown on the console, into a page, or with plot and report into a folder."""
    from llmnorm.evaluation.compare_page import write_pages
    from llmnorm.evaluation.compare_table import insert, markdown, read_results

    results = read_results(options.render)
    if options.into is not None:
        insert(options.render, options.into)
    if options.output_dir is not None:
        write_pages(results, options.output_dir)
    if options.into is None and options.output_dir is None:
        print(markdown(results), end="")


def _check_arguments(parser: Parser) -> None:
    parser.add_argument("plugin", metavar="FILE[:CLASS]", help="a norm or an optimizer of your own")
    parser.add_argument("--options", default="{}", metavar="YAML", help="of the class, as {fraction: 0.5}")


def _check(options: Options, overrides: Words) -> None:
    """Try a plugin on a tiny model: causality, export, resume, two processes; exit 1 if one fails."""
    from llmnorm.config import yaml_dialect
    from llmnorm.training.plugin_check import check_plugin, format_outcomes

    given, _ = yaml_dialect.parse(options.options, "--options")
    if not isinstance(given, dict):
        raise UserError(f"--options {options.options} is no mapping; write it as '{{fraction: 0.5}}'")
    outcomes = check_plugin(options.plugin, given)
    print(format_outcomes(outcomes))
    if any(outcome.result == "FAIL" for outcome in outcomes):
        sys.exit(1)


def _schema_arguments(parser: Parser) -> None:
    parser.add_argument("--output", type=Path, metavar="FILE", help="write it here instead of printing it")


def _schema(options: Options, overrides: Words) -> None:
    """Write the JSON schema of a run's YAML, for completion and checking in an editor."""
    from llmnorm.config.help import json_schema_text

    if options.output is None:
        print(json_schema_text(), end="")
        return
    try:
        options.output.write_text(json_schema_text(), encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"--output {options.output} cannot be written: {error.strerror}; name another file"
        ) from error
    print(f"wrote {options.output}")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not a positive integer")
    return number


def _temperature(text: str) -> float:
    number = float(text)
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"{number} is not a temperature; give 0 or more")
    return number


class Command(NamedTuple):
    """One subcommand: its arguments, its action (whose docstring is its help), whether it takes overrides."""

    arguments: Callable[[Parser], None]
    run: Callable[[Options, Words], None]
    takes_overrides: bool = False


COMMANDS: dict[str, Command] = {
    "prepare": Command(_config_arguments, _prepare, takes_overrides=True),
    "plan": Command(_plan_arguments, _plan, takes_overrides=True),
    "export": Command(_export_arguments, _export),
    "convert": Command(_convert_arguments, _convert),
    "sample": Command(_sample_arguments, _sample),
    "certify": Command(_certify_arguments, _certify),
    "report": Command(_report_arguments, _report),
    "compare": Command(_compare_arguments, _compare),
    "check": Command(_check_arguments, _check),
    "schema": Command(_schema_arguments, _schema),
}


def main(words: Words | None = None) -> None:
    """Run one subcommand; a user's mistake is one paragraph and exit code 2."""
    parser = Parser(prog="llmnorm", description=__doc__, allow_abbrev=False)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        summary = command.run.__doc__
        command.arguments(subparsers.add_parser(name, help=summary, description=summary, allow_abbrev=False))
    words = sys.argv[1:] if words is None else words
    options, rest = parser.parse_known_args(words)
    options.words = words
    chosen = COMMANDS[options.command]
    with exit_on_user_error():
        if rest and not chosen.takes_overrides:
            raise UserError(
                f"llmnorm {options.command} does not know {' '.join(rest)}; "
                f"`llmnorm {options.command} --help` lists its options"
            )
        chosen.run(options, rest)


if __name__ == "__main__":
    main()
