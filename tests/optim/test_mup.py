"""muP: the coordinate check, what it multiplies, what it refuses, and that an export computes the same."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmnorm.errors import UserError
from llmnorm.export import export_checkpoint, fold_to_stock
from llmnorm.modeling import LlmNormConfig, LlmNormForCausalLM, initialize_weights
from llmnorm.optim import create_optimizer, format_routing_table, routing_table
from llmnorm.optim.mup import TRANSFERS, Transfer, lr_multipliers

BASE = {"base_hidden_size": 64, "base_head_dim": 16}
VOCABULARY, LENGTH, ROWS, STEPS = 64, 32, 8, 4
# Small enough for every method to stay in its linear regime, large enough for fp32.
RATES = {
    "adamw": 2e-3,
    "adamp": 2e-3,
    "scale": 2e-3,
    "sinkgd": 2e-2,
    "swan": 2e-2,
    "muon": 1e-2,
    "normuon": 1e-2,
}


def build(width: int, mup: dict | None = BASE, seed: int = 0, **changes) -> LlmNormForCausalLM:
    """4 heads that grow with the width, as everything else does."""
    values = {
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "initializer_range": 64**-0.5,
        "mup": mup,
        **changes,
    }
    model = LlmNormForCausalLM(LlmNormConfig(**values))
    initialize_weights(model, seed)
    return model


def coordinates(model: LlmNormForCausalLM, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    handles = []
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "o_proj", "down_proj", "lm_head")):
            keep = lambda module, args, output, name=name: found.update({name: output})  # noqa: E731
            handles.append(module.register_forward_hook(keep))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def growth(
    method: str, widths: tuple[int, ...], mup: dict | None, alone: bool = False, **options
) -> dict[str, float]:
    """name -> d log RMS(x_after - x_before) / d log width of what the module puts out, over STEPS updates.

    alone: only hidden matrices move, so that a wrong rate of theirs cannot hide behind the embedding's.
    """
    generator = torch.Generator().manual_seed(0)
    # Text with structure: each token is likely followed by its successor.
    ids = (torch.randint(VOCABULARY, (ROWS, 1), generator=generator) + torch.arange(LENGTH)) % VOCABULARY
    noise = torch.rand(ids.shape, generator=generator) < 0.2
    ids = torch.where(noise, torch.randint(VOCABULARY, ids.shape, generator=generator), ids)
    moved: dict[str, list[float]] = {}
    for width in widths:
        model = build(width, mup)
        optimizer = create_optimizer(method, model, lr=RATES[method], **options)
        for group in optimizer.param_groups:
            if alone and group["role"] != "hidden_matrix":
                group["lr"] = 0.0
        before = coordinates(model, ids)
        for _ in range(STEPS):
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
        for name, after in coordinates(model, ids).items():
            moved.setdefault(name, []).append((after - before[name]).square().mean().sqrt().item())
    x = torch.tensor(widths).log()
    x = x - x.mean()
    return {
        name: ((x * torch.tensor(sizes).log()).sum() / x.square().sum()).item()
        for name, sizes in moved.items()
    }


WIDTHS = (64, 128, 256)
# A rate that is wrong by m^(1/2) shows as 0.5. What is right drifts by up to 0.16 over these widths, of which
# the smallest has heads of 16 and layers of 64: terms of relative size d^(-1/2) have not died out.
TOLERANCE = 0.2
# The head's change has a part W_0 dx that falls as d^(-1/2) beside dW x, which stays.
HEAD = -0.45


def assert_flat(slopes: dict[str, float]) -> None:
    for name, slope in slopes.items():
        assert (HEAD if name == "lm_head" else -TOLERANCE) < slope < TOLERANCE, (name, slopes)


def test_coordinate_check_adamw_moves_every_activation_alike_at_all_widths():
    """Card 8.4's oracle, widths 64 to 512."""
    assert_flat(growth("adamw", (*WIDTHS, 512), BASE))


def test_coordinate_check_fails_without_mup():
    slopes = growth("adamw", WIDTHS, None)
    assert min(slopes.values()) > 0.4 and max(slopes.values()) > 1.2, slopes


ALONE = [
    ("adamw", {}),
    ("muon", {}),
    ("muon", {"lr_mode": "adam_rms"}),
    ("normuon", {}),
    ("normuon", {"lr_mode": "adam_rms"}),
    ("scale", {}),
    ("scale", {"lr_mode": "keller"}),
    ("scale", {"variant": "paper"}),
    ("sinkgd", {}),
    ("sinkgd", {"lr_mode": "rms_to_rms"}),
    ("adamp", {}),
]


@pytest.mark.parametrize(("method", "options"), ALONE[:3], ids=str)
def test_coordinate_check_of_hidden_matrices_alone(method, options):
    assert_flat(growth(method, WIDTHS, BASE, alone=True, **options))


@pytest.mark.slow
@pytest.mark.parametrize(("method", "options"), ALONE[3:], ids=str)
def test_coordinate_check_of_hidden_matrices_alone_in_every_mode(method, options):
    assert_flat(growth(method, WIDTHS, BASE, alone=True, **options))


def test_muon_at_adams_rms_does_not_transfer_with_adams_rule(monkeypatch):
    """The reference sheet scales 0.2 sqrt(max(m, n)) like AdamW, by 1/m; its updates then die out."""
    monkeypatch.setitem(TRANSFERS, "muon", TRANSFERS["adamw"])
    slopes = growth("muon", WIDTHS, BASE, alone=True, lr_mode="adam_rms")
    assert max(slopes.values()) < -0.3, slopes


@pytest.mark.slow
def test_swan_and_normuons_paper_variant_grow_with_the_width_and_are_refused(monkeypatch):
    """They fix the RMS of an orthogonal update, whose rank, and so its norm, the batch decides."""
    rule = TRANSFERS["muon"]
    for method, options in (("swan", {}), ("normuon", {"variant": "paper"})):
        with pytest.raises(UserError, match=r"model\.mup"):
            create_optimizer(method, build(64), lr=1e-3, **options)
        monkeypatch.setitem(TRANSFERS, method, Transfer(rule.alignment))
        monkeypatch.setitem(RATES, "swan", 2e-2)
        slopes = growth(method, WIDTHS, BASE, alone=True, **options)
        assert slopes["model.layers.0.self_attn.q_proj"] > 0.3, slopes


def test_at_the_base_width_nothing_changes():
    plain, mup = build(64, None), build(64, BASE)
    for one, other in zip(plain.parameters(), mup.parameters(), strict=True):
        assert torch.equal(one, other)
    ids = torch.arange(24).view(2, 12)
    assert torch.equal(plain(input_ids=ids).logits, mup(input_ids=ids).logits)
    table = [format_routing_table(routing_table(create_optimizer("adamw", m, lr=1e-3))) for m in (plain, mup)]
    assert table[0] == table[1]


@pytest.mark.parametrize("init", ["hf_llama", "mitchell", "small_init"])
def test_initial_weights_follow_the_card(init):
    """std / sqrt(m) for hidden matrices, whatever the base width's rule says; embedding and head stay."""
    base, wide = build(64, init=init), build(256, init=init)
    stds = [{name: p.std().item() for name, p in m.named_parameters() if p.ndim > 1} for m in (base, wide)]
    for name, std in stds[0].items():
        expected = std if "embed" in name or "lm_head" in name else std / 2
        # 4096 numbers know their deviation to 1.1 %.
        assert stds[1][name] == pytest.approx(expected, rel=0.05), name


def test_logits_are_divided_by_m_and_scores_by_the_head_width():
    model = build(256, {"base_hidden_size": 64, "base_head_dim": 16})
    assert model.model.layers[0].self_attn.scaling == pytest.approx(math.sqrt(16) / 64)
    hidden = model.model(input_ids=torch.arange(5)[None]).last_hidden_state
    expected = model.lm_head(hidden) / 4
    torch.testing.assert_close(model(input_ids=torch.arange(5)[None]).logits, expected)


def test_learning_rates_and_decay_of_every_role():
    optimizer = create_optimizer("adamw", build(256), lr=1e-3, weight_decay=0.1)
    groups = {group["role"]: group for group in optimizer.param_groups}
    assert (groups["hidden_matrix"]["lr"], groups["hidden_matrix"]["initial_lr"]) == (2.5e-4, 2.5e-4)
    assert groups["hidden_matrix"]["weight_decay"] == pytest.approx(0.4)
    for role, decay in (("embedding", 0.1), ("lm_head", 0.1), ("vector", 0.0)):
        assert (groups[role]["lr"], groups[role]["weight_decay"]) == (1e-3, decay)
    line = next(
        line for line in format_routing_table(routing_table(optimizer)).splitlines() if "hidden" in line
    )
    assert line.split()[-2] == "0.00025"
    assert lr_multipliers("muon", {"lr_mode": "paper"}, 4.0) == {}
    assert lr_multipliers("scale", {"lr_mode": "keller"}, 4.0) == {"hidden_matrix": 0.5, "lm_head": 2.0}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("norm", ["pre_rmsnorm", "qk_norm"])
def test_exports_compute_the_same_function(tmp_path, tied, norm):
    model = build(
        128, tie_word_embeddings=tied, norm=norm, num_key_value_heads=2, attention_bias=norm != "qk_norm"
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    model.eval()
    ids = torch.arange(40).view(2, 20)
    expected = model(input_ids=ids).logits
    export_checkpoint(model, tmp_path / "hf", format="hf")
    saved = LlmNormConfig.from_pretrained(tmp_path / "hf")
    assert saved.mup == BASE
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    torch.testing.assert_close(again(input_ids=ids).logits, expected, rtol=0, atol=1e-6)
    stock = fold_to_stock(model)
    assert type(stock).__module__.startswith("transformers.")
    # The factors are powers of two times products in another order.
    torch.testing.assert_close(stock(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)


def test_llama_refuses_to_load_it():
    assert "mup" in build(128).config.to_diff_dict()["pretraining_tp"]


@pytest.mark.parametrize(
    ("mup", "words"),
    [
        (3, "must be true, false or a mapping"),
        (
            {"base_width": 3},
            "mup.base_width=3 is not a key of mup; known are base_hidden_size, base_head_dim",
        ),
        ({"base_hidden_size": 0}, "mup.base_hidden_size=0 must be a positive integer"),
    ],
)
def test_bad_values_are_refused(mup, words):
    with pytest.raises(ValueError, match=words):
        build(64, mup)


def test_what_has_no_rule_is_refused_by_name():
    with pytest.raises(UserError, match=r"optimizer\.name=lamb has no known rule for model\.mup"):
        create_optimizer("lamb", build(128), lr=1e-3)
    with pytest.raises(ValueError, match="norm=scalenorm: its one gain grows"):
        build(128, norm="scalenorm")
    with pytest.raises(ValueError, match="norm=ngpt: its weights stay on the unit sphere"):
        build(128, norm="ngpt")
    with pytest.raises(ValueError, match="has no rule for attention=nalaformer"):
        build(128, attention="nalaformer")
    with pytest.raises(UserError, match=r"optimizer\.name=torch.optim.SGD has no known rule for model\.mup"):
        create_optimizer("torch.optim.SGD", build(128), lr=1e-3)


def test_true_and_false_in_a_run():
    assert LlmNormConfig(mup=True).mup == {"base_hidden_size": 256, "base_head_dim": 64}
    assert LlmNormConfig(mup=False).mup is None
