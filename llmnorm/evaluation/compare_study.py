"""What a comparison compares: variants of a run, learning rates, seeds and steps, checked before any run.

A study is one YAML:

    title: ...                    shown above the results
    base: base_2m.yaml            a run's config, relative to the study
    variants:                     name -> keys that differ from the base, and the variant's own `lrs`
      adamw: {}
      muon: {optimizer: {name: muon}, lrs: [3e-3, 1e-2, 3e-2]}
    baseline: adamw               default: the first variant
    lrs: [...]  sweep_steps: 150  seeds: 3  steps: 400  equal: tokens
    gradient_norms: true          show the gradient's norm and its spikes as well; default false

or it is made of two or more run configs, each a variant named after its file. The command line wins over the
study's numbers, and a variant's own `lrs` win over both.
"""

from __future__ import annotations

import contextlib
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmnorm.config import RunConfig, load_run_config, yaml_dialect
from llmnorm.config.dotted import flatten
from llmnorm.config.explain import nearest
from llmnorm.config.loading import parse_overrides
from llmnorm.errors import UserError
from llmnorm.modeling import LlmNormConfig
from llmnorm.plugins import load_run_plugins

DEFAULTS: dict[str, Any] = {
    "lrs": [3e-4, 1e-3, 3e-3],
    "sweep_steps": 150,
    "seeds": 3,
    "steps": 400,
    "equal": "tokens",
    "baseline": None,
}
STUDY_KEYS = ("title", "base", "variants", "gradient_norms", *DEFAULTS)
# Keys of a run that the comparison decides, and where it takes them from.
DECIDED = {
    "output_dir": "give --output_dir",
    "optimizer.lr": "give --lrs, or `lrs: [...]` in a variant",
    "train.max_steps": "give --steps and --sweep-steps",
}
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")


@dataclass(frozen=True)
class Variant:
    """One row of the comparison; `changes` is what it sets, by dotted key."""

    name: str
    config: RunConfig
    lrs: tuple[float, ...]
    changes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tokens_per_step(self) -> int:
        return self.config.train.global_batch_size * self.config.data.sequence_length


@dataclass(frozen=True)
class Study:
    """A comparison that can be run: every variant's config is valid and their losses are comparable."""

    title: str
    variants: tuple[Variant, ...]
    baseline: str
    sweep_steps: int
    steps: int
    seeds: int
    equal: str
    gradient_norms: bool = False

    @property
    def base(self) -> Variant:
        return next(variant for variant in self.variants if variant.name == self.baseline)

    @property
    def sweep_seed(self) -> int:
        """No measured run has the seed that the learning rates were chosen with."""
        return self.base.config.seed

    @property
    def run_seeds(self) -> list[int]:
        return [self.sweep_seed + number for number in range(1, self.seeds + 1)]

    def equal_tokens(self, variant: Variant, steps: int) -> int:
        """Steps in which `variant` reads the tokens that the baseline reads in `steps`."""
        return max(1, round(steps * self.base.tokens_per_step / variant.tokens_per_step))

    def notes(self) -> list[str]:
        """What a reader of the results must know about the variants."""
        order = _order_of_data(self.base.config)
        return [
            f"{variant.name} reads other batches than {self.baseline}, so its seeds are paired by number, "
            "not by data"
            for variant in self.variants
            if _order_of_data(variant.config) != order
        ]


def load_study(
    files: Sequence[str | Path],
    changes: Sequence[str] = (),
    *,
    interval: bool = True,
    **settings: Any,
) -> Study:
    """The study of one study YAML, or of two or more run configs.

    changes: `section.key=value` words for every variant. settings: the keys of `DEFAULTS`, None where the
    study or the default decides. interval: whether intervals are asked for, which takes two seeds.

    Raises `UserError` for every mistake that can be seen before a run is started.
    """
    if not files:
        raise UserError(
            "llmnorm compare needs what it is to compare: one study YAML, such as "
            "configs/compare/norms_2m.yaml, "
            "or two or more run configs"
        )
    common = _common_changes(changes)
    paths = [Path(file) for file in files]
    contents = [_mapping(path) for path in paths]
    studies = [path for path, content in zip(paths, contents, strict=True) if _is_study(content)]
    if studies and len(paths) > 1:
        raise UserError(
            f"{studies[0]} is a study, which holds its variants; give it alone, or give run configs only"
        )
    study = contents[0] if studies else {}
    given = {key: study.get(key) for key in DEFAULTS} | {
        key: value for key, value in settings.items() if value is not None
    }
    chosen = {key: DEFAULTS[key] if value is None else value for key, value in given.items()}
    _check_numbers(chosen)
    if studies:
        _check_study(study, paths[0])
        variants = _variants_of_study(study, paths[0], common, chosen["lrs"])
    else:
        variants = _variants_of_files(paths, common, chosen["lrs"])
    if len(variants) < 2:
        raise UserError(
            f"{paths[0]} gives {len(variants)} variant, and a comparison needs two; add a variant to the "
            "study, or give another run config"
        )
    if interval and chosen["seeds"] < 2:
        raise UserError(
            f"seeds={chosen['seeds']} has no spread to make an interval from; give --seeds 3, or "
            "--no-interval for single numbers without interval and p-value"
        )
    baseline = chosen["baseline"] or variants[0].name
    names = [variant.name for variant in variants]
    if baseline not in names:
        raise UserError(
            f"baseline={baseline} is not a variant; choose one of {', '.join(names)}{_guess(baseline, names)}"
        )
    title = str(study.get("title") or " and ".join(names))
    numbers = {key: chosen[key] for key in ("sweep_steps", "steps", "seeds", "equal")}
    norms = study.get("gradient_norms") or False
    result = Study(title, tuple(variants), baseline, **numbers, gradient_norms=norms)
    _check_comparable(result)
    for variant in result.variants:
        _check_runs(result, variant)
    return result


def run_values(variant: Variant, path: Path, lr: float, seed: int, steps: int, sweep: bool) -> dict[str, Any]:
    """The config of one run: the variant's, with what the comparison decides.

    Nothing is exported and one checkpoint is kept; the untrained model is not scored, nor is a sweep's run
    before its end.
    """
    values = variant.config.to_dict()
    values |= {"output_dir": str(path), "seed": seed}
    values["optimizer"]["lr"] = lr
    values["train"]["max_steps"] = steps
    values["checkpoint"]["keep"] = 1
    values["export"] |= {"at_end": False, "push_to_hub": None}
    values["evaluation"]["at_start"] = False
    if sweep:
        values["evaluation"]["every"] = None
    return values


def _common_changes(words: Sequence[str]) -> dict[str, Any]:
    for word in words:
        if "=" not in word or word.startswith("-"):
            raise UserError(f"--set {word}: write section.key=value, such as --set data.train_files=my.txt")
    parsed = parse_overrides([f"--{word}" for word in words])
    _refuse_decided(flatten(parsed), "--set")
    return parsed


def _refuse_decided(flat: Mapping[str, Any], where: str) -> None:
    for key in flat.keys() & DECIDED.keys():
        raise UserError(f"{where} {key}: the comparison decides {key}; {DECIDED[key]}")


def _mapping(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(
            f"{path}: there is no such file; give a study or a run config (configs/compare/ has studies)"
        )
    content, _ = yaml_dialect.read(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no keys; give a study or a run config")
    return content


def _is_study(content: Mapping[str, Any]) -> bool:
    return "variants" in content or "base" in content


def _check_study(study: Mapping[str, Any], path: Path) -> None:
    for key in study:
        if key not in STUDY_KEYS:
            raise UserError(
                f"{path}: {key} is not a key of a study; it takes {', '.join(STUDY_KEYS)}"
                f"{_guess(str(key), STUDY_KEYS)}"
            )
    if not isinstance(study.get("base"), str):
        raise UserError(
            f"{path}: base={study.get('base')!r} must name the config of a run, relative to the study, such "
            "as base: base_2m.yaml"
        )
    if not isinstance(study.get("variants"), dict):
        raise UserError(
            f"{path}: variants must map names to the keys that they change, such as `adamw: {{}}`"
        )
    if not isinstance(study.get("gradient_norms"), bool | None):
        raise UserError(f"{path}: gradient_norms={study['gradient_norms']!r} must be true or false")


def _check_numbers(chosen: Mapping[str, Any]) -> None:
    for key in ("sweep_steps", "seeds", "steps"):
        value = chosen[key]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{key}={value!r} must be an integer of at least 1, such as {DEFAULTS[key]}")
    if chosen["equal"] not in ("tokens", "time"):
        raise UserError(f"equal={chosen['equal']!r} must be tokens or time")
    _check_rates(chosen["lrs"], "lrs")


def _check_rates(lrs: Any, where: str) -> tuple[float, ...]:
    """The rates in ascending order."""
    numbers: list[Any] = list(lrs) if isinstance(lrs, list | tuple) and lrs else [None]
    for lr in numbers:
        if not isinstance(lr, int | float) or isinstance(lr, bool) or not 0 < lr < math.inf:
            raise UserError(f"{where}={lrs!r} must be learning rates greater than 0, such as 3e-4 1e-3 3e-3")
    if len({f"{lr:g}" for lr in numbers}) < len(numbers):
        raise UserError(f"{where}={lrs!r} has a learning rate twice; give each once")
    return tuple(sorted(float(lr) for lr in numbers))


def _variants_of_study(
    study: Mapping[str, Any], path: Path, common: Mapping[str, Any], lrs: Sequence[float]
) -> list[Variant]:
    base = path.parent / study["base"]
    variants = []
    for name, changes in study["variants"].items():
        _check_name(str(name), path)
        if changes is not None and not isinstance(changes, dict):
            raise UserError(
                f"{path}: variant {name} must be a mapping of keys, such as {{optimizer: {{...}}}}"
            )
        own = dict(changes or {})
        rates = _check_rates(own.pop("lrs", lrs), f"lrs of variant {name}")
        flat = flatten(own)
        _refuse_decided(flat, f"{path}: variant {name},")
        undone = flatten(common).keys() & flat.keys()
        if undone:
            key = sorted(undone)[0]
            raise UserError(
                f"--set {key} contradicts variant {name}, which sets it to {flat[key]!r}; leave it out, or "
                f"edit {path}"
            )
        # Sections open one level, so that what a variant says and what all are given are joined by key.
        overrides = dict(common)
        for key, value in own.items():
            nested = isinstance(value, dict) and "." not in key
            overrides |= {f"{key}.{inner}": item for inner, item in value.items()} if nested else {key: value}
        variants.append(Variant(str(name), _loaded(base, overrides, str(name)), rates, flat))
    return variants


def _variants_of_files(
    paths: Sequence[Path], common: Mapping[str, Any], lrs: Sequence[float]
) -> list[Variant]:
    names = [path.stem for path in paths]
    for name, path in zip(names, paths, strict=True):
        _check_name(name, path)
        if names.count(name) > 1:
            raise UserError(
                f"{name}: two run configs have this name; rename one, variants are named after them"
            )
    configs = [_loaded(path, common, name) for name, path in zip(names, paths, strict=True)]
    first = flatten(configs[0].to_dict())
    variants = []
    for name, config in zip(names, configs, strict=True):
        flat = flatten(config.to_dict())
        changes = {
            key: value for key, value in flat.items() if key not in DECIDED and first.get(key) != value
        }
        variants.append(Variant(name, config, _check_rates(lrs, "lrs"), changes))
    return variants


def _check_name(name: str, path: Path) -> None:
    if not NAME.fullmatch(name):
        raise UserError(
            f"{path}: {name!r} cannot name a variant, because it names folders too; use letters, digits "
            "and _ . + -"
        )


def _loaded(path: Path, overrides: Mapping[str, Any], name: str) -> RunConfig:
    try:
        config = load_run_config(path, overrides)
        load_run_plugins(config)
        if config.model.init_from is None:
            LlmNormConfig(**config.model.arguments(config.model.vocab_size or 1024, 2))
    except ValueError as error:
        raise UserError(f"variant {name}: {error}") from error
    return config


def _order_of_data(config: RunConfig) -> tuple[Any, ...]:
    data = config.data
    text = (data.train_files, data.recipe, data.document_masking, data.sequence_length, data.resampling)
    return (*text, config.train.global_batch_size)


def _held_out(config: RunConfig) -> dict[str, Any]:
    """What decides which tokens a final loss is the mean of."""
    data, evaluation = config.data, config.evaluation
    held_out: dict[str, Any] = {
        "data.tokenizer": data.tokenizer,
        "data.validation_files": data.validation_files,
        "data.validation_fraction": data.validation_fraction,
        "data.text_field": data.text_field,
        "evaluation.context_length": evaluation.context_length or data.sequence_length,
        "evaluation.stride": evaluation.stride,
        "evaluation.max_tokens": evaluation.max_tokens,
    }
    if not isinstance(data.tokenizer, str) or data.validation_files is None:
        held_out["data.train_files"] = data.train_files
    return held_out


def _check_comparable(study: Study) -> None:
    for variant in study.variants:
        schedule = variant.config.train.batch_schedule
        if schedule is not None:
            raise UserError(
                f"variant {variant.name}: train.batch_schedule.name={schedule.name} gives its steps "
                "different numbers of tokens, so equal tokens cannot be planned; remove train.batch_schedule"
            )
    expected = _held_out(study.base.config)
    if expected["data.validation_files"] is None and not expected["data.validation_fraction"]:
        raise UserError(
            "data.validation_files=null leaves nothing to compare on; give --set "
            "data.validation_files=FILE, or "
            "--set data.validation_fraction=0.05"
        )
    for variant in study.variants:
        for key, value in _held_out(variant.config).items():
            if value != expected[key]:
                raise UserError(
                    f"variant {variant.name}: {key}={value} is {expected[key]} in {study.baseline}, so "
                    "their losses are means over other tokens; give both the same"
                )


def _check_runs(study: Study, variant: Variant) -> None:
    """Load the configs of a sweep's and a measured run; the variant's own warnings have been shown."""
    for steps, sweep in ((study.sweep_steps, True), (study.steps, False)):
        steps = study.equal_tokens(variant, steps)
        values = run_values(variant, Path("run"), variant.lrs[0], 0, steps, sweep)
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                load_run_config(None, values)
        except UserError as error:
            raise UserError(f"variant {variant.name}, run of {steps} steps: {error}") from error


def _guess(word: str, choices: Sequence[str]) -> str:
    guess = nearest(word, choices)
    return f"; did you mean {guess}?" if guess else ""
