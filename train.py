"""Train a model: `python train.py --config configs/quickstart.yaml [--section.key VALUE ...]`.

The same command runs under `accelerate launch` and `torchrun`. Started again after an interruption it goes on
from the newest checkpoint.
"""

from __future__ import annotations

import argparse
import sys

from llmnorm.errors import UserError, exit_on_user_error

USAGE = """\
usage: python train.py --config FILE [--section.key VALUE ...] [--dry-run | --print-config | --help]

  --dry-run         print the resolved config, parameters, memory, FLOPs, tokens and steps; train nothing
  --print-config    print the resolved config as YAML; train nothing

Every key can be overridden, as --train.max_steps 100 or --train.max_steps=100. Values are YAML; of equal keys
the last one wins. The keys:
"""


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    for flags in (["--dry-run"], ["--print-config"], ["--help", "-h"]):
        parser.add_argument(*flags, action="store_true")
    options, overrides = parser.parse_known_args(words)
    if options.help:
        from llmnorm.config.help import help_text

        print(USAGE, help_text(), sep="\n", end="")
        return
    if options.config is None:
        raise UserError("--config is required; try python train.py --config configs/quickstart.yaml")

    from llmnorm.config import load_run_config

    config = load_run_config(options.config, overrides)
    if options.print_config:
        print(config.to_yaml(), end="")
        return

    from llmnorm.training.plan import check_model, print_plan

    check_model(config, config.parallel.strategy)
    if options.dry_run:
        print_plan(config)
        return
    from llmnorm.training import train

    train(config)


if __name__ == "__main__":
    with exit_on_user_error():
        main(sys.argv[1:])
