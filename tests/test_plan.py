"""The plan of a run: counts against the model, FLOPs against its matrices, memory against measurements."""

from __future__ import annotations

import gc
import resource
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llmnorm.config import RunConfig, load_run_config
from llmnorm.errors import UserError
from llmnorm.modeling import LlmNormConfig, LlmNormForCausalLM
from llmnorm.modeling.quantization import QuantizedLinear
from llmnorm.training.activation_memory import activation_bytes, matrix_bytes
from llmnorm.training.plan import check_model, flops_per_token, format_plan, make_plan, parameters_by_role

ROOT = Path(__file__).parents[1]


def run_config(**overrides: Any) -> RunConfig:
    values = {
        "output_dir": "runs/x",
        "model": {"preset": "2m", "vocab_size": 512},
        "data": {"train_files": "absent.txt", "tokenizer": "absent", "sequence_length": 128},
        "optimizer.lr": 1e-3,
        "train": {"max_steps": 10, "global_batch_size": 8},
    }
    return load_run_config(None, {**values, **{key.replace("__", "."): v for key, v in overrides.items()}})


def small(**changes: Any) -> LlmNormConfig:
    sizes = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 6, "num_attention_heads": 4}
    return LlmNormConfig(**{**sizes, "num_key_value_heads": 2, "vocab_size": 512, **changes})


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of every storage that is alive, and the most that ever were."""

    def __init__(self, ignored: list[torch.Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, Any] = {tensor.untyped_storage()._cdata: None for tensor in ignored}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._watch(tensor.untyped_storage())
        return result

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def freed(_: Any) -> None:
            self.now -= size
            self._known.pop(key, None)

        self._known[key] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)


def measure(config: LlmNormConfig, precision: str, mode: str) -> tuple[float, float]:
    """Bytes per token kept after the forward pass, and the most in a pass, without weights and gradients."""
    batch, length = 4, 128
    model = LlmNormForCausalLM(config).train()
    if precision == "bf16_pure":
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
    model.set_activation_checkpointing(mode)
    ids = torch.randint(0, config.vocab_size, (batch, length))
    count = torch.tensor(batch * length)
    autocast = precision == "bf16"
    copied = [m for m in model.modules() if isinstance(m, nn.Linear) and not isinstance(m, QuantizedLinear)]
    copies = 2 * sum(m.weight.numel() for m in copied) if autocast else 0
    with LiveBytes([ids, count, *model.parameters(), *model.buffers()]) as live:
        for _ in range(2):  # the second micro-batch finds the gradients allocated, as most do
            before = live.peak = live.now
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = model(
                    input_ids=ids, labels=ids, shift_labels=ids, num_items_in_batch=count, use_cache=False
                ).loss
                gc.collect()
                kept = live.now - before - copies
                loss.backward()
            del loss
        peak = live.peak - before - copies
    return kept / count.item(), peak / count.item()


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
@pytest.mark.parametrize(
    ("precision", "options"),
    [
        ("fp32", {}),
        ("bf16", {}),
        ("bf16_pure", {}),
        ("bf16", {"residual_dtype": "bf16"}),
        ("bf16", {"norm": "post_rmsnorm"}),
        ("fp32", {"norm": "pre_ln", "num_key_value_heads": 4}),
        ("fp32", {"norm": "mix_ln", "vocab_size": 4096}),
        ("fp32", {"attention": "nalaformer"}),
        ("bf16", {"attention": "nalaformer"}),
        ("bf16", {"attention": {"softmax_every": 2, "linear": "sla"}}),
        ("fp32", {"attention_options": {"gate": "elementwise"}}),
        ("bf16", {"quantization": {"group_size": 32}}),
    ],
)
def test_activation_formula_against_measurement(precision: str, mode: str, options: dict[str, Any]) -> None:
    """At the 2m shape. The formula leaves out what does not grow with the batch (rotary tables: 0.1 to 1 %)
    and the small temporaries of a backward pass, which only show where a layer is recomputed."""
    config = small(**options)
    kept, peak = measure(config, precision, mode)
    formula = activation_bytes(config, precision)
    assert formula.kept(mode) == pytest.approx(kept, rel=0.02)
    # Packing into 4 bits has temporaries of its own, which the formula takes for one round figure.
    recomputed = {"none": 0.02, "selective": 0.04 if "quantization" in options else 0.02, "full": 0.08}
    assert formula.peak(mode) == pytest.approx(peak, rel=recomputed[mode])


def test_activation_formula_of_a_compressed_stream() -> None:
    """Its widened weights are no leaves, so autocast's copies of them go with a checkpointed layer; without
    checkpointing they are kept as any other's."""
    config = small(norm="pre_crmsnorm")
    kept, peak = measure(config, "bf16", "none")
    formula = activation_bytes(config, "bf16")
    assert formula.kept("none") == pytest.approx(kept, rel=0.02)
    assert formula.peak("none") == pytest.approx(peak, rel=0.02)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("norm", ["pre_rmsnorm", "pre_crmsnorm"])
def test_flops_count_every_matrix_of_the_model(norm: str, tied: bool, groups: int) -> None:
    config = small(norm=norm, num_key_value_heads=groups, head_dim=48, tie_word_embeddings=tied)
    model = LlmNormForCausalLM(config)
    matrices = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    flops = flops_per_token(config, 256)
    assert flops.matmul_parameters == matrices
    assert flops.matmul == 6 * matrices
    assert flops.attention == 6 * 6 * 4 * 48 * 256  # 6 layers, 4 heads of width 48
    assert flops.total == flops.matmul + flops.attention


def test_flops_of_linear_attention_do_not_grow_with_the_length() -> None:
    """Its matrices, gate included, are counted as the model has them; the rest by hand for one layer."""
    config = small(attention={"softmax_every": 6})
    model = LlmNormForCausalLM(config)
    flops = flops_per_token(config, 4096)
    matrices = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    assert flops.matmul_parameters == matrices
    # K = 2 * 32 + 1 features, W = 33 values, chunks of 64, 4 heads over 2 groups.
    linear = 4 * (65 + 33) * 32 + 6 * 65 * 33
    assert flops.attention == 6 * (5 * linear + 128 * 4096)
    longer = flops_per_token(config, 65_536)
    assert longer.attention - flops.attention == 6 * 128 * (65_536 - 4096)


def test_flops_against_the_counter_of_torch() -> None:
    """Matrix products of one forward and backward pass; torch counts no attention in its CPU kernel."""
    from torch.utils.flop_counter import FlopCounterMode

    config = small()
    model = LlmNormForCausalLM(config)
    ids = torch.randint(0, 512, (2, 64))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    products = {op: n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op)}
    assert sum(products.values()) == flops_per_token(config, 64).matmul * ids.numel()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("norm", ["pre_rmsnorm", "post_ln", "mix_ln"])
def test_parameters_by_role_are_all_the_parameters(norm: str, tied: bool) -> None:
    model = LlmNormForCausalLM(small(norm=norm, tie_word_embeddings=tied, attention_bias=True, mlp_bias=True))
    counts = parameters_by_role(model)
    assert sum(counts.values()) == sum(parameter.numel() for parameter in model.parameters())
    assert counts["embedding"] == 512 * 128
    assert counts["lm_head"] == (0 if tied else 512 * 128)
    assert counts["mlp"] == 6 * (3 * 128 * 352 + 2 * 352 + 128)
    assert counts["attention"] == 6 * (2 * 128 * 128 + 2 * 64 * 128 + 128 + 2 * 64 + 128)
    norms = [n for name, p in model.named_parameters() if "norm" in name for n in [p.numel()]]
    assert counts["norm"] == sum(norms)


@pytest.mark.parametrize(
    ("precision", "bytes_each", "copies"), [("fp32", 4, False), ("bf16", 4, True), ("bf16_pure", 2, False)]
)
def test_state_memory_of_one_process(precision: str, bytes_each: int, copies: bool) -> None:
    plan = make_plan(run_config(train__precision=precision), environment={})
    total = sum(plan.parameters.values())
    assert plan.strategy == "none"
    assert plan.memory.weights == plan.memory.gradients == bytes_each * total
    assert plan.memory.optimizer == pytest.approx(2 * bytes_each * total, rel=1e-3)  # and a step count each
    assert plan.memory.copies == (2 * plan.flops.matmul_parameters if copies else 0)
    assert plan.memory.activations["none"] == 8 * 128 * plan.per_token.peak("none")


def test_sharding_divides_matrices_and_leaves_vectors_whole() -> None:
    config = run_config(train__precision="fp32")
    one = make_plan(config, 1, {})
    ddp = make_plan(config, 4, {})
    sharded = make_plan(run_config(train__precision="fp32", parallel__strategy="fsdp2"), 4, {})
    assert (one.strategy, ddp.strategy, sharded.strategy) == ("none", "ddp", "fsdp2")
    assert ddp.memory.weights == one.memory.weights
    assert ddp.memory.activations["none"] == one.memory.activations["none"] // 4
    vectors = 4 * one.optimizer_roles["vector"]
    assert sharded.memory.weights == (one.memory.weights - vectors) // 4 + vectors
    assert sharded.memory.gradients == sharded.memory.weights
    assert sharded.memory.optimizer < 0.26 * one.memory.optimizer
    root, block = 4 * 2 * 512 * 128, 4 * (2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 352)
    assert sharded.memory.copies == root + 3 * block
    offloaded = {"parallel__strategy": "fsdp2", "parallel__cpu_offload": True, "train__precision": "fp32"}
    assert make_plan(run_config(**offloaded), 4, {}).memory.weights == vectors


def test_the_launcher_decides_processes_and_strategy() -> None:
    launched = {"RANK": "0", "WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    plan = make_plan(run_config(), environment=launched)
    assert (plan.processes, plan.strategy, plan.batch.micro_batch_size) == (2, "fsdp2", 4)
    with pytest.raises(UserError, match=r"train.global_batch_size=8 is not a multiple of the 3 processes"):
        make_plan(run_config(), 3, {})


def test_the_printed_plan() -> None:
    text = format_plan(make_plan(run_config(train__micro_batch_size=2), environment={}))
    for expected in (
        "# resolved config\nseed: 0\n",
        "hidden_size: 128",
        "vocabulary 512",
        "embedding ",
        "lm_head ",
        "hidden_matrix ",
        "memory per process (none, 1 process, bf16, 2 x 128 tokens at a time)",
        "copies of weights",
        "optimizer state",
        "none                  ",
        "selective ",
        "full ",
        "<- this run",
        "6 N_matmul + attention",
        "sequences per step: 8 = 2 x 4 x 1 (micro-batch x accumulation x processes)",
        "tokens per step: 1,024 positions",
        "steps: 10, of which 0 warm-up",
        "tokens: 10,240",
    ):
        assert expected in text, f"{expected!r} is not in the plan"
    assert load_run_config(None, {"output_dir": "x", **_yaml_part(text)}) is not None


def _yaml_part(text: str) -> dict[str, Any]:
    from llmnorm.config import yaml_dialect

    return yaml_dialect.parse(text.partition("\nparameters:")[0], "plan")[0]


def test_a_trained_tokenizer_needs_no_data() -> None:
    tokenizer = {"train": "bpe", "vocab_size": 1000}
    plan = make_plan(run_config(model__vocab_size=None, data__tokenizer=tokenizer), environment={})
    assert plan.model_config.vocab_size == 1024
    assert plan.model_config.true_vocab_size == 1000


def test_a_missing_tokenizer_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    config = run_config(model__vocab_size=None, data__tokenizer=str(tmp_path / "absent"))
    with pytest.raises(UserError, match=r"model.vocab_size is null") as caught:
        make_plan(config, environment={})
    assert "--model.vocab_size 32000" in str(caught.value)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"post_fraction": 1.5}, "norm_options.post_fraction=1.5 must be a number in [0, 1]"),
        (
            {"num_post_layers": 7},
            "norm_options.num_post_layers=7 must be an integer from 0 to num_hidden_layers",
        ),
        ({"post_fractoin": 0.5}, "did you mean post_fraction?"),
    ],
)
def test_options_that_the_norm_refuses(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError) as caught:
        make_plan(run_config(model__norm="mix_ln", model__norm_options=options), environment={})
    assert expected in str(caught.value)


def test_initial_weights_decide_the_sizes(tmp_path: Path) -> None:
    LlmNormForCausalLM(small(num_hidden_layers=3, norm="mix_ln")).save_pretrained(tmp_path)
    config = run_config(model={"init_from": str(tmp_path)})
    plan = make_plan(config, environment={})
    assert plan.model_config.num_hidden_layers == 3
    assert plan.model_config.norm == "mix_ln"
    with pytest.raises(UserError, match="num_hidden_layers"):
        make_plan(run_config(model={"init_from": str(tmp_path), "num_hidden_layers": 4}), environment={})


def test_7b_is_planned_without_memory_for_it() -> None:
    config = load_run_config(ROOT / "configs" / "mixln_1b.yaml", {"model.preset": "7b"})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    plan = make_plan(config, environment={})
    assert sum(plan.parameters.values()) == 6_739_464_192
    assert (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000
    )  # KiB; the weights are 25 GiB


def test_mup_shows_the_factor_of_every_role_and_refuses_a_method_without_a_rule_before_data() -> None:
    mup = {"base_hidden_size": 32, "base_head_dim": 32}
    lines = format_plan(make_plan(run_config(model__mup=mup), environment={})).splitlines()
    shown = {line.split()[0]: line.split()[2:] for line in lines if line.endswith("(mup)")}
    assert shown["hidden_matrix"] == ["lr", "x", "0.25", "(mup)"]
    assert {tuple(words) for role, words in shown.items() if role != "hidden_matrix"} == {
        ("lr", "x", "1", "(mup)")
    }
    check_model(run_config(model__mup=True))
    refused = run_config(model__mup=True, optimizer={"name": "lamb", "lr": 1e-3})
    with pytest.raises(UserError, match=r"optimizer\.name=lamb has no known rule for model\.mup"):
        check_model(refused)


@pytest.mark.parametrize(
    ("strategy", "changes", "words"),
    [
        ("fsdp2", {"optimizer": {"class_path": "torch.optim.Adafactor", "lr": 1e-3}}, "beyond the rows"),
        ("deepspeed", {"model__weight_constraint": {"name": "spectral_cap"}}, "spectral_cap cannot run with"),
    ],
)
def test_what_a_strategy_refuses_is_said_before_data(strategy: str, changes: dict, words: str) -> None:
    config = run_config(**changes, parallel__zero_stage=3)
    check_model(config)
    check_model(config, "ddp")
    with pytest.raises(UserError, match=words):
        check_model(config, strategy)


@pytest.mark.parametrize("precision", ["fp32", "bf16_pure"])
def test_int8_weights_are_planned_as_they_are_kept(precision: str) -> None:
    from llmnorm.int8 import stored_bytes
    from llmnorm.optim import create_optimizer

    options = {"optimizer": {"name": "galore", "lr": 1e-3, "weights": "int8"}, "train__precision": precision}
    config = run_config(**options, **{"train__max_steps": 10, "train__global_batch_size": 8})
    plan = make_plan(config, environment={})
    net = LlmNormForCausalLM(plan.model_config)
    net = net.to(torch.bfloat16) if precision == "bf16_pure" else net
    plain = sum(p.numel() * p.element_size() for p in net.parameters())
    create_optimizer("galore", net, 1e-3, weights="int8")
    assert plan.memory.weights == sum(stored_bytes(p) for p in net.parameters()) < plain
    assert plan.memory.gradients == plain


@pytest.mark.parametrize(
    "steps",
    [
        "spectral_norm",
        "sigma_reparam",
        "weight_norm",
        "spectral_conditioning",
        ["weight_standardization", "sigma_reparam"],
    ],
    ids=str,
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_kept_matrices_of_a_parametrization_against_what_autograd_saves(steps: Any, precision: str) -> None:
    def saved(parametrization: Any) -> tuple[nn.Module, int]:
        model = LlmNormForCausalLM(small(num_hidden_layers=2, weight_parametrization=parametrization)).train()
        own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        kept: dict[int, torch.Tensor] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.untyped_storage().data_ptr() not in own:
                kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        ids = torch.arange(2)[None]
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
            loss = model(ids, labels=ids).loss
        assert loss.requires_grad
        return model, sum(tensor.untyped_storage().nbytes() for tensor in kept.values())

    model, measured = saved(steps)
    planned = matrix_bytes(model, precision, gathered=False)
    difference = measured - saved(None)[1]
    assert planned["full"] == planned["selective"] == planned["none"] // 2
    # Lengths, gains and means of rows come on top: less than 0.2 bytes for each number of a row of 128.
    matrices = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    assert 0 <= difference - planned["none"] < 0.2 * matrices
    assert planned["none"] > 0 or (precision == "bf16" and not isinstance(steps, list))
