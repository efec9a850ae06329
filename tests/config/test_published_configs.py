"""Every YAML in configs/: it loads, its schema line is right, and its model has the published size."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llmnorm.config import PRESETS, check_batch, load_run_config
from llmnorm.modeling import LlmNormConfig, LlmNormForCausalLM
from llmnorm.optim import create_optimizer
from llmnorm.optim.schedules import SCHEDULES, create_schedule
from llmnorm.training.plan import check_model, make_plan

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
RUNS = sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent.name not in ("accelerate", "compare"))
PAPERS = [path for path in RUNS if "papers" in path.parts]
NORM_PAPERS = [path for path in PAPERS if path.parent.name in ("mixln", "lns")]
METHOD_PAPERS = [path for path in PAPERS if path not in NORM_PAPERS]
# Parameters in millions, embeddings untied, vocabulary 32000: the published sizes.
PUBLISHED = {
    "60m": 58.07,
    "71m": 70.6,
    "130m": 134.1,
    "250m": 247.4,
    "350m": 368.0,
    "1b": 1339.1,
    "3b": 2685.8,
    "7b": 6738.4,
}
# Updates, warm-up and learning rate of the papers' runs by size.
RECIPE = {
    ("mixln", "71m"): (10_000, 1_000, 1e-3),
    ("mixln", "130m"): (20_000, 2_000, 1e-3),
    ("mixln", "250m"): (40_000, 4_000, 1e-3),
    ("mixln", "1b"): (50_000, 5_000, 5e-4),
    ("lns", "130m"): (20_000, 2_000, 1e-3),
    ("lns", "250m"): (40_000, 4_000, 1e-3),
    ("lns", "350m"): (60_000, 6_000, 5e-4),
    ("lns", "1b"): (100_000, 1_000, 5e-4),
}
MAIN_TABLES = {
    "mixln": {
        "post_rmsnorm": {"71m": 35.18, "130m": 26.95, "250m": 1409.09, "1b": 1411.54},
        "pre_rmsnorm": {"71m": 34.77, "130m": 26.78, "250m": 21.92, "1b": 18.65},
        "mix_ln": {"71m": 33.12, "130m": 26.07, "250m": 21.39, "1b": 18.18},
    },
    "lns": {
        "post_rmsnorm": {"130m": 26.95, "250m": 1409.79, "350m": 1368.33, "1b": 1390.75},
        "mix_ln": {"130m": 26.07, "250m": 21.39, "350m": 1363.21, "1b": 1414.78},
        "pre_rmsnorm": {"130m": 26.73, "250m": 21.92, "350m": 19.58, "1b": 17.02},
        "layernorm_scaling": {"130m": 25.76, "250m": 20.35, "350m": 18.20, "1b": 15.71},
    },
}
ALPHA_SWEEP = {0: 18.65, 4: 18.34, 6: 18.18, 8: 18.41, 10: 18.55, 12: 18.86, 24: 1434.0}


def name_of(path: Path) -> str:
    return str(path.relative_to(CONFIGS))


def parameters(model_config: LlmNormConfig) -> int:
    with torch.device("meta"):
        model = LlmNormForCausalLM(model_config)
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("path", RUNS, ids=name_of)
def test_every_run_loads_without_a_word(path: Path, capsys: pytest.CaptureFixture) -> None:
    config = load_run_config(path)
    check_model(config)
    assert capsys.readouterr().err == ""
    for processes in (1, 2, 4, 8):
        check_batch(config, processes)
    create_schedule(max_steps=config.train.max_steps, **config.schedule.model_dump())
    assert load_run_config(None, config.to_dict()) == config


@pytest.mark.parametrize("path", RUNS, ids=name_of)
def test_every_run_points_its_editor_to_the_schema(path: Path) -> None:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    schema = re.fullmatch(r"# yaml-language-server: \$schema=(\S+)", first)
    assert schema is not None
    assert (path.parent / schema[1]).resolve() == CONFIGS / "schema.json"


@pytest.mark.parametrize("path", RUNS, ids=name_of)
def test_every_run_passes_the_editor_schema(path: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    from llmnorm.config import yaml_dialect

    schema = json.loads((CONFIGS / "schema.json").read_text(encoding="utf-8"))
    values, _ = yaml_dialect.read(path)
    assert list(jsonschema.Draft202012Validator(schema).iter_errors(values)) == []


def test_output_directories_differ() -> None:
    directories = [load_run_config(path).output_dir for path in RUNS]
    assert len(set(directories)) == len(directories)


@pytest.mark.parametrize("path", NORM_PAPERS, ids=name_of)
def test_a_norm_papers_run_has_its_recipe(path: Path) -> None:
    paper, size = path.parent.name, path.stem.partition("_")[0]
    config = load_run_config(path)
    steps, warmup, lr = RECIPE[paper, size]
    assert (config.train.max_steps, config.schedule.warmup_steps, config.optimizer.lr) == (steps, warmup, lr)
    assert (config.model.preset, config.model.paper_exact, config.model.vocab_size) == (size, True, 32_000)
    assert (config.data.recipe, config.data.sequence_length, config.data.tokenizer) == (
        "galore",
        256,
        "t5-base",
    )
    assert (config.train.global_batch_size, config.train.precision, config.train.grad_clip) == (
        512,
        "bf16_pure",
        None,
    )
    assert config.schedule.model_dump() == {"name": "cosine", "warmup_steps": warmup, "min_lr_ratio": 0.1}
    assert config.optimizer.options(seed=0) == {
        "weight_decay": 0.0,
        "lr_multipliers": {},
        "fused_backward": False,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "state_dtype": "param",
        "stochastic_rounding": False,
        "seed": 0,
    }
    assert config.output_dir == f"runs/papers/{paper}/{path.stem}"
    assert config.paper is not None
    assert config.paper.note
    assert f"Published perplexity {config.paper.perplexity:g}".rstrip("0") in path.read_text(encoding="utf-8")


METHOD_SIZES = ("60m", "130m", "350m", "1b")
METHOD_STEPS = {"60m": 10_000, "130m": 20_000, "350m": 60_000, "1b": 100_000}
FULL_RANK, HALF_RANK = (128, 256, 256, 512), (64, 128, 128, 256)
GALORE = {"variant": "released", "lr": 0.01, "update_proj_gap": 200, "eps": 1e-6}
APOLLO = {"lr": 0.01, "update_proj_gap": 200, "granularity": "channel", "eps": 1e-6}
MINI = {"update_proj_gap": 200, "rank": 1, "scale": 128.0, "granularity": "tensor", "eps": 1e-6}
STABLE = {"variant": "released", "reset_interval": 1000, "eps": 1e-8}
FOUR_BIT = {**STABLE, "gammas": (0.7, 0.9, 0.999), "lr": (None, 1e-3, 4e-4, 2e-4)}
# row of the paper -> published perplexity by size, and options: one value, or one per size.
METHOD_RUNS = {
    "galore/galore": ((34.88, 25.36, 18.95, 15.64), {**GALORE, "rank": FULL_RANK, "scale": 0.25}),
    "fira/fira": (
        (31.06, 22.73, 16.85, 14.31),
        {**GALORE, "rank": FULL_RANK, "scale": (0.25, 0.25, 0.25, 0.0625)},
    ),
    "apollo/apollo": (
        (31.55, 22.94, 16.85, 14.20),
        {**APOLLO, "rank": FULL_RANK, "scale": (1.0, 1.0, 1.0, 0.5)},
    ),
    "apollo/apollo_half_rank": ((31.26, 23.18, 16.98, 14.25), {**APOLLO, "rank": HALF_RANK, "scale": 1.0}),
    "apollo_mini/apollo_mini": ((31.93, 23.53, 17.18, 14.17), {**MINI, "lr": 0.01}),
    "apollo_mini/apollo_mini_lr_0_02": ((30.95, 22.85, 16.63, 13.95), {**MINI, "lr": 0.02}),
    "q_galore/q_galore": (
        (34.88, 25.53, 19.79, 16.25),
        {
            **GALORE,
            "eps": 1e-8,
            "lr": (0.015, 0.015, 0.01, 0.01),
            "rank": (128, 256, 256, 1024),
            "scale": 0.25,
            "weights": "int8",
            "projection_bits": 4,
            "lazy_refresh": True,
            "state_bits": 8,
        },
    ),
    "apollo/q_apollo": (
        (31.97, 24.16, 18.79, None),
        {**APOLLO, "rank": FULL_RANK, "scale": 1.0, "weights": "int8", "state_dtype": "fp32"},
    ),
    "apollo_mini/q_apollo_mini": (
        (33.05, 24.70, 18.90, None),
        {**MINI, "lr": 0.01, "weights": "int8", "state_dtype": "fp32"},
    ),
    "stable_spam/stable_spam": (
        (28.84, 22.21, 16.85, 13.90),
        {**STABLE, "gammas": (0.85, 0.99999, 0.999), "lr": (1e-3, 8e-4, 4e-4, 2e-4)},
    ),
    "stable_spam/stable_spam_int4": ((None, 24.33, 17.76, 17.42), FOUR_BIT),
    "stable_spam/stable_spam_fp4": ((None, 26.31, 19.49, 18.48), FOUR_BIT),
}


def test_rows_of_the_optimizer_papers_are_complete() -> None:
    expected = {
        f"{row.replace('/', f'/{size}_')}.yaml"
        for row, (published, _) in METHOD_RUNS.items()
        for size, perplexity in zip(METHOD_SIZES, published, strict=True)
        if perplexity is not None
    }
    assert {f"{path.parent.name}/{path.name}" for path in METHOD_PAPERS} == expected


@pytest.mark.parametrize("path", METHOD_PAPERS, ids=name_of)
def test_an_optimizer_papers_run_has_its_recipe(path: Path) -> None:
    size, _, row = path.stem.partition("_")
    config, at = load_run_config(path), METHOD_SIZES.index(size)
    published, options = METHOD_RUNS[f"{path.parent.name}/{row}"]
    used = {**config.optimizer.options(seed=0), "lr": config.optimizer.lr}
    for key, value in {**options, "weight_decay": 0.0, "betas": (0.9, 0.999)}.items():
        by_size = isinstance(value, tuple) and len(value) == len(METHOD_SIZES)
        assert used[key] == (value[at] if by_size else value), key
    four_bit = row.rpartition("_")[2] if row.endswith(("int4", "fp4")) else None
    quantization = config.model.quantization
    assert (quantization and (quantization.weights, quantization.activations, quantization.parity)) == (
        four_bit and (four_bit, four_bit, "released")
    )
    steps = 20_000 if four_bit else METHOD_STEPS[size]
    assert config.train.max_steps == steps
    assert config.schedule.model_dump() == {
        "name": "cosine", "warmup_steps": steps // 10, "min_lr_ratio": 0.1,
    }  # fmt: skip
    assert (config.model.preset, config.model.paper_exact, config.model.vocab_size) == (size, True, 32_000)
    data = config.data
    assert (data.recipe, data.sequence_length, data.tokenizer) == ("galore", 256, "t5-base")
    train = config.train
    assert (train.global_batch_size, train.precision, train.grad_clip) == (512, "bf16_pure", None)
    assert config.output_dir == f"runs/papers/{path.parent.name}/{path.stem}"
    assert config.paper is not None
    assert (config.paper.perplexity, bool(config.paper.note)) == (published[at], True)
    assert f"Published perplexity {config.paper.perplexity:g}".rstrip("0") in path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("paper", "norm", "size"),
    [(paper, norm, size) for paper, rows in MAIN_TABLES.items() for norm in rows for size in rows[norm]],
)
def test_main_tables_are_complete(paper: str, norm: str, size: str) -> None:
    config = load_run_config(CONFIGS / "papers" / paper / f"{size}_{norm}.yaml")
    assert config.paper is not None
    assert config.paper.perplexity == MAIN_TABLES[paper][norm][size]
    assert config.model.norm == norm
    layers = config.model.num_hidden_layers
    assert layers is not None
    options = {"mix_ln": {"num_post_layers": layers // 4}, "post_rmsnorm": {"final_norm": True}}
    assert config.model.norm_options == options.get(norm, {})


def test_the_ratio_sweep_is_complete() -> None:
    for posts, published in ALPHA_SWEEP.items():
        config = load_run_config(CONFIGS / "papers" / "mixln" / f"1b_alpha_{posts:02d}_of_24.yaml")
        assert config.model.norm_options == {"num_post_layers": posts}
        assert config.paper is not None
        assert config.paper.perplexity == published


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_parameter_counts(size: str) -> None:
    """Exact sizes give the published count to the last printed digit; rounded ones are at most 3 % larger."""
    run = {
        "output_dir": "x",
        "model": {"preset": size, "vocab_size": 32_000},
        "data": {"train_files": "x", "tokenizer": "x", "sequence_length": 256},
        "optimizer.lr": 1.0,
        "train": {"max_steps": 1, "global_batch_size": 1},
    }
    exact = load_run_config(None, {**run, "model.paper_exact": True}).model.arguments(None, 256)
    rounded = load_run_config(None, run).model.arguments(None, 256)
    published = PUBLISHED[size] * 1e6
    digit = 0.01e6 if size == "60m" else 0.1e6
    count = parameters(LlmNormConfig(**exact))
    assert abs(count - published) <= digit / 2
    assert count <= parameters(LlmNormConfig(**rounded)) <= 1.03 * count


def test_sizes_that_the_papers_used() -> None:
    assert set(PUBLISHED) <= set(PRESETS)
    used = [
        {load_run_config(path).model.preset for path in papers} for papers in (NORM_PAPERS, METHOD_PAPERS)
    ]
    assert used == [{"71m", "130m", "250m", "350m", "1b"}, {"60m", "130m", "350m", "1b"}]


def test_choices_are_those_of_the_rooms() -> None:
    """Names in the config are names that exist, with the options that exist: neither list may run ahead."""
    from typing import get_args

    from llmnorm.config.architecture import AttentionName, InitName, NormName
    from llmnorm.config.describe import sections_in, variant_name
    from llmnorm.config.optimizers import CUSTOM
    from llmnorm.config.presets import ARCHITECTURES
    from llmnorm.config.schema import RunConfig
    from llmnorm.modeling.attention_plan import ATTENTION_OPTIONS
    from llmnorm.modeling.initialization import INIT_RULES
    from llmnorm.modeling.lipschitz import ARCHITECTURES as MODEL_ARCHITECTURES
    from llmnorm.modeling.mlp import MLPS
    from llmnorm.modeling.residual import PRESETS as NORMS
    from llmnorm.modeling.weight_constraint import CONSTRAINTS
    from llmnorm.modeling.weight_parametrization import PARAMETRIZATIONS

    fields = RunConfig.model_fields
    assert set(get_args(NormName)) == set(NORMS)
    assert set(get_args(InitName)) == set(INIT_RULES)
    assert set(get_args(AttentionName)) == set(ATTENTION_OPTIONS)
    model = fields["model"].annotation.model_fields
    assert set(get_args(model["mlp"].annotation)) == set(MLPS)
    (constraint,) = sections_in(model["weight_constraint"].annotation)
    assert set(get_args(constraint.model_fields["name"].annotation)) == {*CONSTRAINTS, "none"}
    known = set().union(*CONSTRAINTS.values())
    assert set(constraint.model_fields) == {"name", *known}
    (parametrization,) = sections_in(model["weight_parametrization"].annotation)
    assert set(get_args(parametrization.model_fields["name"].annotation)) == set(PARAMETRIZATIONS)
    known = set().union(*(row.options for row in PARAMETRIZATIONS.values()))
    assert set(parametrization.model_fields) == {"name", "modules", *known}
    assert set(get_args(model["architecture"].annotation)) == set(MODEL_ARCHITECTURES)
    lipschitz = dict(ARCHITECTURES["lipschitz"])
    assert lipschitz.pop("weight_constraint") == {"name": "spectral_cap", "max_norm": 1.0}
    assert lipschitz == MODEL_ARCHITECTURES["lipschitz"]
    schedules = {variant_name(section): section for section in sections_in(fields["schedule"].annotation)}
    assert set(schedules) == set(SCHEDULES)
    sections = {variant_name(section): section for section in sections_in(fields["optimizer"].annotation)}
    del sections[CUSTOM]  # whose options are those of the class it names
    for name, section in sections.items():
        options = set(section.model_fields) - {"name", "lr"}
        assert options == set(create_optimizer.options(str(name)))


def test_defaults_of_the_optimizer_are_those_of_create_optimizer() -> None:
    from torch import nn

    section = load_run_config(CONFIGS / "quickstart.yaml", {"optimizer": {"betas": [0.9, 0.999]}}).optimizer
    ours = type(section)(lr=1.0)
    bare = create_optimizer("adamw", nn.Linear(2, 2), lr=1.0)
    assert {key: bare.defaults[key] for key in ("betas", "eps")} == {"betas": ours.betas, "eps": ours.eps}
    assert [group["weight_decay"] for group in bare.param_groups] == [0.0] * len(bare.param_groups)


def test_quickstart_is_the_documented_run() -> None:
    config = load_run_config(CONFIGS / "quickstart.yaml")
    assert config.model.norm == "mix_ln"
    assert (config.optimizer.name, config.train.precision, config.output_dir) == (
        "adamw",
        "fp32",
        "runs/quickstart",
    )
    plan = make_plan(config, environment={})
    sizes = plan.model_config
    assert (sizes.hidden_size, sizes.intermediate_size, sizes.num_hidden_layers) == (128, 352, 6)
    assert (sizes.num_attention_heads, sizes.num_key_value_heads) == (4, 2)
    for files in (config.data.train_files, config.data.validation_files):
        assert isinstance(files, str)
        assert (ROOT / files).is_file()


def test_mixln_1b_is_planned_without_data_or_tokenizer() -> None:
    plan = make_plan(load_run_config(CONFIGS / "mixln_1b.yaml"), 8, {})
    assert plan.model_config.norm_options["num_post_layers"] == 6
    assert plan.model_config.vocab_size == 32_128
    assert math.isclose(sum(plan.parameters.values()), 1.346e9, rel_tol=1e-3)
    assert plan.batch.micro_batch_size * plan.batch.accumulation_steps * 8 == 512


def test_training_accepts_the_papers_vocabulary(tmp_path: Path) -> None:
    """The embedding has 32000 rows for T5's 32100 ids; the last 100 are sentinels that no text contains."""
    from llmnorm.training.build import draw_blueprint

    class T5:
        bos_token_id, eos_token_id, pad_token_id = None, 1, 0

        def __len__(self) -> int:
            return 32_100

    config = load_run_config(CONFIGS / "papers" / "mixln" / "130m_mix_ln.yaml")
    assert draw_blueprint(config, T5(), tmp_path).model_config.vocab_size == 32_000  # type: ignore[arg-type]


SHOW_STRATEGY = """\
from llmnorm.config import load_run_config
from llmnorm.training.processes import resolve_strategy
from llmnorm.training.zero_checks import resolve_zero_stage
config = load_run_config("configs/mixln_1b.yaml")
strategy = resolve_strategy(config.parallel, config.train)
stage = resolve_zero_stage(config.parallel) if strategy == "deepspeed" else "-"
print("strategy:", strategy, stage, flush=True)
"""
LAUNCH_FILES = {"ddp": "ddp -", "fsdp2": "fsdp2 -"} | {
    f"zero{stage}": f"deepspeed {stage}" for stage in (1, 2, 3)
}


@pytest.mark.distributed
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in ("zero1", "zero3") else n for n in LAUNCH_FILES]
)
def test_launch_files_ask_for_what_their_name_says(name: str, tmp_path: Path) -> None:
    script = tmp_path / "show.py"
    script.write_text(SHOW_STRATEGY, encoding="utf-8")
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    launcher += ["--config_file", f"configs/accelerate/{name}.yaml", "--num_processes", "2"]
    environment = {**os.environ, "MASTER_PORT": "0", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*launcher, "--main_process_port", "0", str(script)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count(f"strategy: {LAUNCH_FILES[name]}") == 2
