"""Perplexity of any Hugging Face causal language model on a text.

python eval/perplexity.py --model DIR --data FILE [--context-length 256] [--stride N] [--json OUT]
torchrun --nproc_per_node 8 eval/perplexity.py ...       the same number, in an eighth of the time
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch
from torch import distributed

from llmnorm.errors import UserError, exit_on_user_error
from llmnorm.evaluation import (
    PerplexityResult,
    evaluate_dataset,
    evaluation_metrics,
    galore_legacy,
    read_held_out,
)
from llmnorm.evaluation.held_out import read_rows
from llmnorm.evaluation.loading import check_model_folder, default_device, load_causal_lm, load_tokenizer

EXACT, LEGACY = "exact", "galore_legacy"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="folder of a Hugging Face causal language model")
    add(
        "--data",
        required=True,
        action="append",
        metavar="[NAME=]FILE",
        help="text, jsonl, parquet; may be repeated",
    )
    add("--tokenizer", help="folder of the tokenizer (default: the model's)")
    add("--context-length", type=int, default=256, help="tokens per window (default: 256)")
    add("--stride", type=int, help="tokens between window starts (default: the windows are disjoint)")
    add(
        "--batch-size",
        type=int,
        default=8,
        help="windows per forward pass; changes only galore_legacy's number",
    )
    add("--max-tokens", type=int, help="score only the first so many tokens of each text")
    add(
        "--convention",
        choices=[EXACT, LEGACY],
        default=EXACT,
        help="galore_legacy: the biased count of GaLore papers",
    )
    add(
        "--processes", type=int, default=1, help="galore_legacy: number of processes the paper evaluated with"
    )
    add(
        "--text-field",
        default="text",
        help="key or column of a document in jsonl and parquet (default: text)",
    )
    add(
        "--add-special-tokens",
        action="store_true",
        help="let the tokenizer add its BOS or EOS to each document",
    )
    add("--append-eos", action="store_true", help="EOS after each document, as in training")
    add("--trust-remote-code", action="store_true", help="run code in the model's folder (ours runs anyway)")
    add("--json", type=Path, metavar="OUT", help="also write the numbers here")
    return parser.parse_args()


def named(data: list[str]) -> dict[str, str]:
    """[NAME=]FILE arguments as name -> file; a file without a name is called by its own."""
    pairs = [("", item) if Path(item).exists() else item.rpartition("=")[::2] for item in data]
    sets = {name or Path(file).name: file for name, file in pairs}
    if len(sets) < len(data):
        raise UserError(f"--data: two of {', '.join(data)} have the same name; write NAME=FILE.")
    return sets


def evaluate(arguments: argparse.Namespace, rank: int, world_size: int) -> dict[str, PerplexityResult]:
    if arguments.convention == LEGACY and arguments.stride is not None:
        raise UserError(
            "--stride has no meaning with --convention galore_legacy, which scores whole rows; drop one."
        )
    sets = named(arguments.data)
    check_model_folder(arguments.model)
    tokenizer = load_tokenizer(arguments.tokenizer or arguments.model, arguments.trust_remote_code)
    share = {"rank": rank, "world_size": world_size}
    size = {"context_length": arguments.context_length, "batch_size": arguments.batch_size}
    if arguments.convention == LEGACY:
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        if pad is None:
            raise UserError(f"{LEGACY} pads its rows and the tokenizer has neither a PAD nor an EOS token.")
        rows = {
            name: read_rows(file, tokenizer, arguments.context_length, arguments.text_field)
            for name, file in sets.items()
        }
        model = load_causal_lm(arguments.model, trust_remote_code=arguments.trust_remote_code)
        options = {**size, **share, "pad_token_id": pad, "processes": arguments.processes}
        return {name: galore_legacy(model, texts, **options) for name, texts in rows.items()}
    options = {"text_field": arguments.text_field, "append_eos": arguments.append_eos}
    options["add_special_tokens"] = arguments.add_special_tokens
    texts = {name: read_held_out(file, tokenizer, **options) for name, file in sets.items()}
    model = load_causal_lm(arguments.model, trust_remote_code=arguments.trust_remote_code)
    size |= {"stride": arguments.stride, "max_tokens": arguments.max_tokens}
    return {name: evaluate_dataset(model, text, **size, **share) for name, text in texts.items()}


def show(name: str, result: PerplexityResult) -> None:
    stride = f"stride {result.stride}" if result.stride else "disjoint windows"
    print(
        f"{name}\n  perplexity      {result.perplexity:.4f}    ({result.convention}, loss {result.loss:.6f} "
        "nats per token)"
    )
    if result.convention != EXACT:
        print(f"  exact loss      {result.nll_sum / result.tokens:.6f}")
    if result.word_perplexity is not None:
        print(f"  word perplexity {result.word_perplexity:.4f}")
        print(f"  bits per byte   {result.bits_per_byte:.4f}")
        print(f"  text            {result.words:,} words, {result.bytes:,} bytes")
    print(
        f"  tokens          {result.tokens:,} scored, context {result.context_length}, {stride}, "
        f"{result.dtype}"
    )
    if result.tokenizer_hash and result.data_hash:
        print(f"  sha256          tokenizer {result.tokenizer_hash[:12]}, data {result.data_hash[:12]}")


def as_json(results: dict[str, PerplexityResult], model: str) -> dict:
    """One text: its numbers. Several: each under "sets", and the numbers of all tokens together on top."""
    first = next(iter(results.values()))
    if len(results) == 1:
        return {"model": model, **first.to_dict()}
    pooled = evaluation_metrics(results)
    top = {key: pooled[f"eval/{key}"] for key in ("loss", "perplexity", "tokens")}
    top["nll_sum"] = sum(result.nll_sum for result in results.values())
    same = {key: first.to_dict()[key] for key in ("context_length", "stride", "convention", "dtype")}
    return {
        "model": model,
        **top,
        **same,
        "sets": {name: result.to_dict() for name, result in results.items()},
    }


def main() -> None:
    arguments = parse()
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1:
        if torch.cuda.is_available():
            torch.cuda.set_device(default_device())
        distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    results = evaluate(arguments, rank, world_size)
    if rank == 0:
        for name, result in results.items():
            show(name, result)
        if arguments.json:
            text = json.dumps(as_json(results, arguments.model), indent=2) + "\n"
            try:
                arguments.json.write_text(text, encoding="utf-8")
            except OSError as error:
                raise UserError(
                    f"--json {arguments.json} cannot be written: {error.strerror or error}."
                ) from error
    if world_size > 1:
        distributed.destroy_process_group()


if __name__ == "__main__":
    with exit_on_user_error():
        main()
