"""INT8 weights of Q-GaLore and Q-APOLLO: codes, exact products and gradients, bytes, resume, export."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from llmnorm.checkpoint import (
    CheckpointStore,
    model_tensors,
    optimizer_tensors,
    read_tensors,
    restore_optimizer,
)
from llmnorm.errors import UserError
from llmnorm.export import export_checkpoint
from llmnorm.export.source import load_model
from llmnorm.int8 import Int8Weight, encode, stored_bytes
from llmnorm.modeling import LlmNormConfig, LlmNormForCausalLM, initialize_weights
from llmnorm.optim import GaLore, create_optimizer, quantize_weights
from llmnorm.optim.random_numbers import uniform_like

SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
TOKENS = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(3))
Q_GALORE = {
    "weights": "int8",
    "projection_bits": 4,
    "lazy_refresh": True,
    "state_bits": 8,
    "rank": 8,
    "seed": 2,
}
METHODS = {
    "galore": {**Q_GALORE, "update_proj_gap": 3},
    "apollo": {"weights": "int8", "state_dtype": "fp32", "rank": 8, "update_proj_gap": 3},
    "apollo_mini": {"weights": "int8", "update_proj_gap": 3},
    "fira": {"weights": "int8", "rank": 8, "variant": "paper", "weight_decay": 0.1},
}


def requantize(weight: Int8Weight, values: torch.Tensor, seed: int) -> None:
    weight.requantize_(values, uniform_like(values, seed))


def model(dtype: torch.dtype = torch.float32, **keys) -> LlmNormForCausalLM:
    built = LlmNormForCausalLM(LlmNormConfig(**SIZES, **keys))
    initialize_weights(built, 1)
    return built.to(dtype)


def advance(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        loss = net(TOKENS.roll(step, 1), labels=TOKENS.roll(step, 1)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def int8_weights(net: nn.Module) -> dict[str, Int8Weight]:
    return {name: p for name, p in net.named_parameters() if isinstance(p, Int8Weight)}


def test_golden_codes():
    v = torch.tensor([[0.9, -0.05, 0.31, -0.62, 0.11, 0.48, -0.27, 0.03]])
    codes, scale, zero = encode(v, 256, torch.float32)
    assert codes.tolist() == [[255, 96, 156, 0, 122, 185, 59, 109]]
    assert scale.item() == pytest.approx(0.005960784, abs=1e-9)
    assert zero.item() == 104


@pytest.mark.parametrize("block", [256, 128])
def test_o15_rounding_at_random_is_right_on_average_and_within_a_step(block):
    values = torch.randn(3, 300, generator=torch.Generator().manual_seed(0))
    draws = 4000
    many = values.expand(draws, 3, 300)
    parts = encode(many, block, torch.float32, uniform_like(many, seed=1))
    drawn = parts.decode(block)
    scale = parts.scale[0].repeat_interleave(block, -1)[:, :300]
    assert ((drawn - values).abs() <= scale * (1 + 1e-5)).all()
    bias = (drawn.double().mean(0) - values).abs() / scale
    # A step is one Bernoulli draw of variance at most 1/4; 4.5 sigma for 900 numbers.
    inside = ((parts.codes > 0) & (parts.codes < 255)).all(0)
    assert inside.sum() >= 870
    assert bias[inside].max() < 4.5 * 0.5 / draws**0.5
    assert bias.max() <= 0.55  # the ends of a range are cut by up to half a step


def test_a_block_that_does_not_move_keeps_its_codes():
    generator = torch.Generator().manual_seed(0)
    weight = Int8Weight.of(torch.randn(4, 300, generator=generator))
    before = weight.clone()
    values = weight.decoded().clone()
    values[2, 270] += 1.0
    requantize(weight, values, 1)
    same = (weight.decoded() == before.decoded()).all(-1)
    assert same.tolist() == [True, True, False, True]
    assert torch.equal(weight.parts.codes[2, :256], before.parts.codes[2, :256])


def test_blocks_of_one_sign_are_as_near_as_others():
    weight = Int8Weight.of(torch.linspace(5.0, 6.0, 256).expand(2, 256))
    assert (weight.decoded() - torch.linspace(5.0, 6.0, 256)).abs().max() <= 6.0 / 255 / 2 * (1 + 1e-4)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_products_and_gradients_are_those_of_the_decoded_weight(bias, autocast):
    torch.manual_seed(0)
    layer, plain = nn.Linear(40, 24, bias=bias), nn.Linear(40, 24, bias=bias)
    plain.load_state_dict(layer.state_dict())
    layer.weight = nn.Parameter(Int8Weight.of(layer.weight))
    plain.weight.data = layer.weight.detach().decoded()
    results = []
    for net in (layer, plain):
        x = torch.randn(3, 5, 40, generator=torch.Generator().manual_seed(1), requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = net(x)
        y.backward(torch.ones_like(y) + y.detach())
        results.append((y, x.grad, net.weight.grad, *([net.bias.grad] if bias else [])))
    for ours, theirs in zip(*results, strict=True):
        assert type(ours) is torch.Tensor
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, **({"rtol": 0, "atol": 0} if not bias else {}))


def test_nothing_but_codes_is_kept_for_the_backward_pass():
    weight = nn.Parameter(Int8Weight.of(torch.randn(64, 256)))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        F.linear(torch.randn(2, 256), weight).sum().backward()
    assert [type(t) for t in kept if t.shape == (64, 256)] == [Int8Weight]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_o21_bytes_of_weights_are_those_of_codes_and_ranges(dtype):
    net = model(dtype)
    create_optimizer("galore", net, lr=0.01, **Q_GALORE)
    weights = int8_weights(net)
    assert len(weights) == 2 * 7
    for p in weights.values():
        m, n = p.shape
        assert stored_bytes(p) == m * n + m * -(-n // 256) * (4 + dtype.itemsize)
        storages = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in p.parts}
        assert sum(storages.values()) == stored_bytes(p)
        assert p.dtype == dtype


@pytest.mark.parametrize("name", METHODS)
def test_training_lowers_the_loss(name):
    net = model()
    optimizer = create_optimizer(name, net, lr=0.01, **METHODS[name])
    losses = advance(net, optimizer, range(12))
    assert losses[-1] < losses[0] - 0.1


def test_an_export_has_plain_weights_and_computes_what_the_codes_do(tmp_path):
    net = model()
    advance(net, create_optimizer("galore", net, lr=0.01, **Q_GALORE), range(2))
    export = export_checkpoint(net, tmp_path / "export")
    plain = LlmNormForCausalLM.from_pretrained(export)
    assert not int8_weights(plain)
    for key, weight in int8_weights(net).items():
        assert torch.equal(plain.get_parameter(key), weight.detach().decoded())
    with torch.no_grad():
        assert torch.equal(net.eval()(TOKENS).logits, plain.eval()(TOKENS).logits)


def test_a_zero_gradient_moves_nothing():
    net = model()
    optimizer = create_optimizer("galore", net, lr=0.01, weights="int8", rank=8)
    before = {name: p.parts.codes.clone() for name, p in int8_weights(net).items()}
    for p in net.parameters():
        p.grad = torch.zeros(p.shape)
    optimizer.step()
    assert all(torch.equal(p.parts.codes, before[name]) for name, p in int8_weights(net).items())


@pytest.mark.parametrize("name", ["galore", "apollo"])
@pytest.mark.parametrize("at", [2, 4])
def test_o22_a_checkpoint_resumes_to_the_bit(tmp_path, name, at):
    def build() -> tuple[LlmNormForCausalLM, torch.optim.Optimizer]:
        net = model(torch.bfloat16)
        return net, create_optimizer(name, net, lr=0.01, **METHODS[name])

    straight, optimizer = build()
    advance(straight, optimizer, range(6))
    stopped, optimizer = build()
    advance(stopped, optimizer, range(at))
    tensors, state = optimizer_tensors(stopped, optimizer)
    store = CheckpointStore(tmp_path, asynchronous=False)
    files = {"model_config.json": stopped.config.to_json_string(use_diff=False)}
    saved = store.save(at, {**model_tensors(stopped), **tensors}, {"optimizer": state, "step": at}, files)
    resumed, other = build()
    torch.manual_seed(at)
    read_tensors(saved, model_tensors(resumed))
    restore_optimizer(resumed, other, saved)
    advance(resumed, other, range(at, 6))
    for (key, ours), (_, theirs) in zip(
        model_tensors(resumed).items(), model_tensors(straight).items(), strict=True
    ):
        assert torch.equal(ours, theirs), key
    loaded = load_model(saved)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    for key, weight in int8_weights(stopped).items():
        assert torch.equal(loaded.get_parameter(key), weight.detach().decoded())


def test_copies_read_like_the_weight_and_foreign_writes_are_refused():
    weight = nn.Parameter(Int8Weight.of(torch.randn(6, 40)))
    copied = copy.deepcopy(weight)
    assert isinstance(copied, Int8Weight) and isinstance(copied, nn.Parameter)
    assert torch.equal(copied.decoded(), weight.decoded())
    assert copied.parts.codes.data_ptr() != weight.parts.codes.data_ptr()
    assert torch.equal(weight.detach().to(torch.float64), weight.detach().decoded(torch.float64))
    assert type(weight.detach() * 2) is torch.Tensor
    with torch.no_grad(), pytest.raises(NotImplementedError, match="would write into an INT8 weight"):
        weight.mul_(0.5)
    with torch.no_grad():
        weight.copy_(torch.ones(6, 40))
    torch.testing.assert_close(weight.detach().decoded(), torch.ones(6, 40))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.b.weight = self.a.weight


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (Tied, r"cannot keep b.weight, which is a.weight as well"),
        (lambda: model(quantization={"group_size": 16}), r"int8 and model.quantization both decide"),
        (lambda: model(weight_constraint={"name": "spectral_cap"}), r"int8 and model.weight_constraint both"),
        (lambda: model(norm="ngpt"), r"of model.norm=ngpt needs to be exact"),
    ],
)
def test_other_owners_of_the_weights_are_refused(build, message):
    with pytest.raises(UserError, match=message):
        create_optimizer("galore", build(), lr=0.01, weights="int8")


def test_plain_and_int8_weights_go_to_the_methods_that_take_them():
    with pytest.raises(UserError, match=r"needs INT8 weights, and w is a plain tensor; call llmnorm.optim"):
        GaLore([("w", torch.zeros(8, 8))], weights="int8")
    net = model()
    quantize_weights(net)
    with pytest.raises(UserError, match=r"holds INT8 codes, which Muon moves only with optimizer.weights"):
        create_optimizer("muon", net, lr=0.01)


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(UserError, match=r"optimizer.weights=int8 works in one process: DDP and FSDP2"):
        create_optimizer("galore", model(), lr=0.01, weights="int8")


def test_a_step_far_below_a_code_is_made_on_average():
    """Rounding to nearest would leave every weight where it was."""
    values = torch.zeros(64, 256)
    values[:, 0], values[:, 1] = 1.0, -1.0
    moved = []
    for int8 in (True, False):
        net = nn.Linear(256, 64, bias=False)
        with torch.no_grad():
            net.weight.copy_(values)
        options = {"weights": "int8"} if int8 else {}
        optimizer = create_optimizer("apollo", net, lr=1e-3, rank=8, **options)
        net.weight.grad = torch.full((64, 256), 0.1)
        optimizer.step()
        weight = net.weight.detach()
        moved.append((weight.decoded() if int8 else weight)[:, 2:] - values[:, 2:])
    quantized, plain = moved
    code, count = 2 / 255, 64 * 254
    assert 0.02 * code < plain.abs().max() < 0.45 * code
    sigma = 0.5 * code / count**0.5
    assert (quantized.double().mean() - plain.double().mean()).abs() < 4 * sigma < plain.abs().mean()
