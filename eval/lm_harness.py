"""Downstream tasks of lm-evaluation-harness on an exported model (needs `pip install 'llmnorm[eval]'`).

python eval/lm_harness.py --model DIR [--tasks hellaswag,piqa] [--json OUT]
python eval/lm_harness.py --model DIR --tasks my_task --include-path my_tasks/      offline, your own YAML and
data
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from llmnorm.errors import UserError, exit_on_user_error
from llmnorm.evaluation.harness import BASE_SUITE, run_harness


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="folder of a Hugging Face causal language model")
    add("--tasks", default=",".join(BASE_SUITE), help="names, joined by commas (default: %(default)s)")
    add("--include-path", help="folder with task YAML files of your own")
    add("--num-fewshot", type=int, help="examples in the prompt (default: the task's)")
    add("--batch-size", default="8", help="requests per forward pass, or auto (default: 8)")
    add("--limit", type=int, help="only the first so many examples of each task, for a trial")
    add("--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="default: float32")
    add("--device", help="cpu, cuda, cuda:1 ... (default: a GPU if there is one)")
    add("--trust-remote-code", action="store_true", help="run code in the model's folder (ours runs anyway)")
    add("--json", type=Path, metavar="OUT", help="also write the results here")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    results = run_harness(
        arguments.model,
        [task for task in arguments.tasks.split(",") if task],
        include_path=arguments.include_path,
        num_fewshot=arguments.num_fewshot,
        batch_size=int(arguments.batch_size) if arguments.batch_size.isdigit() else arguments.batch_size,
        limit=arguments.limit,
        dtype=arguments.dtype,
        device=arguments.device,
        trust_remote_code=arguments.trust_remote_code,
    )
    for task, metrics in results["results"].items():
        for metric, value in metrics.items():
            if isinstance(value, float):
                print(f"{task:24} {metric:32} {value:.4f}")
    if arguments.json:
        try:
            arguments.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"--json {arguments.json} cannot be written: {error.strerror or error}."
            ) from error


if __name__ == "__main__":
    with exit_on_user_error():
        main()
