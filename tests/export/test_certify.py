"""`llmnorm certify`: what it prints, saves and refuses; O4.9: a reloaded model has the same certificate."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llmnorm.cli import main
from llmnorm.evaluation.certificate import NORM_PAIRS, certify
from llmnorm.evaluation.certified_radius import log10_radii, smallest_half_distance
from llmnorm.export import export_checkpoint
from llmnorm.export.card import with_section
from llmnorm.export.hf import _certificate
from llmnorm.export.source import load_model

TEXT = "the quick brown fox jumps over the lazy dog. " * 20


@pytest.fixture
def lipschitz(make_model: Callable[..., Any]) -> Any:
    return make_model("convex", architecture="lipschitz", num_hidden_layers=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_o4_9_a_reloaded_model_has_the_identical_certificate(
    lipschitz: Any, tokenizer: Any, tmp_path: Path, dtype: torch.dtype
) -> None:
    """Bit for bit, and of the rounded weights: an export in bf16 has another one than the model it is of."""
    out = export_checkpoint(lipschitz, tmp_path / "out", tokenizer=tokenizer, dtype=dtype)
    again = certify(load_model(out))
    assert again == certify(load_model(out))
    assert again == certify(lipschitz.to(dtype))
    assert again.weights == str(dtype).removeprefix("torch.")
    saved = json.loads((out / "certificate.json").read_text())
    assert saved["log10_lipschitz"] == again.log10_lipschitz
    assert "## Lipschitz certificate" in (out / "README.md").read_text()


def test_certify_a_run_with_text(
    lipschitz: Any, make_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, text, other = make_run(lipschitz), tmp_path / "text.txt", tmp_path / "deep" / "numbers.json"
    text.write_text(TEXT)
    main(["certify", str(run), "--data", str(text), "--json", str(other), "--attack-steps", "6"])
    numbers = json.loads(other.read_text())
    assert numbers == json.loads((run / "certificate.json").read_text())
    expected = certify(lipschitz)
    assert numbers["log10_lipschitz"] == expected.log10_lipschitz == expected.log10["logit_difference"]
    assert numbers["formula"] == "per_head"
    assert numbers["norm_pair"] == NORM_PAIRS["logit_difference"]
    assert numbers["log10_lower_bound"] <= numbers["log10_lipschitz"]
    assert numbers["log10_tightness"] == numbers["log10_lower_bound"] - numbers["log10_lipschitz"]
    assert numbers["text"]["log10_radius_rms"]["median"] < 0
    assert 0 <= numbers["text"]["share_beyond_half_distance"] <= 1
    names = [layer["name"] for layer in numbers["layers"]]
    assert names == ["layers.0.self_attn", "layers.0.mlp", "layers.1.self_attn", "layers.1.mlp"]
    assert numbers["layers"][-1]["log10_so_far"] == pytest.approx(numbers["log10"]["hidden_rms"])
    assert len(numbers["layers"][0]["matrices"]["q_proj"]["heads"]) == 4
    assert len(numbers["layers"][0]["matrices"]["k_proj"]["heads"]) == 2
    printed = capsys.readouterr().out
    assert all(name in printed for name in names)
    assert f"log10 L = {numbers['log10_lipschitz']:.4f}" in printed
    assert "median certified radius over" in printed


def test_the_card_of_an_export_is_brought_up_to_date(
    lipschitz: Any, make_run: Callable[..., Path], tokenizer: Any
) -> None:
    run = make_run(lipschitz)
    out = export_checkpoint(run, run / "export")
    main(["certify", str(out), "--attack-steps", "2"])
    card = (out / "README.md").read_text()
    assert card.count("## Lipschitz certificate") == 1
    assert "attack: log10 L is at least" in card
    assert card.count("## Training") == 1
    assert json.loads((out / "certificate.json").read_text())["attack"]["steps"] == 2


def test_the_published_formula_is_labelled_and_not_saved_as_a_certificate(
    lipschitz: Any, make_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = make_run(lipschitz), tmp_path / "published.json"
    main(["certify", str(run), "--formula", "published", "--json", str(out), "--attack-steps", "0"])
    assert json.loads(out.read_text())["formula_is"].startswith("NOT a bound")
    assert "NOT a bound" in capsys.readouterr().out
    assert not (run / "certificate.json").exists()


@pytest.mark.parametrize(
    ("norm", "words", "message"),
    [
        ("pre_rmsnorm", [], "layers.0.input_layernorm is a LlmNormRMSNorm"),
        ("convex", ["--formula", "exact"], "is not one of per_head, published"),
        ("convex", ["--radius", "0.001"], "leaves out embeddings"),
        ("convex", ["--attack-steps", "-1"], "--attack-steps -1 must be 0"),
        ("convex", ["--data", "absent.txt"], "absent.txt"),
    ],
)
def test_mistakes_end_with_one_paragraph_and_write_nothing(
    norm: str,
    words: list[str],
    message: str,
    make_model: Callable[..., Any],
    make_run: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = make_run(make_model(norm, num_hidden_layers=1))
    with pytest.raises(SystemExit) as exit:
        main(["certify", str(run), "--json", str(run / "out.json"), *words])
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert not (run / "out.json").exists()
    assert not (run / "certificate.json").exists()


def test_only_a_model_that_has_one_gets_a_certificate_with_its_export(make_model: Callable[..., Any]) -> None:
    """A norm with an epsilon has none, and DyT has one for whoever asks."""
    for norm in ("pre_rmsnorm", "dyt"):
        assert _certificate(make_model(norm, num_hidden_layers=1), torch.float32) is None


def test_certified_radii_are_the_margins_over_what_can_use_them_up() -> None:
    """min over b of (z_a - z_b) / (||u_a - u_b|| sqrt(D) s L), by hand."""
    head = torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]])
    logits = torch.tensor([[5.0, 1.0, 4.5], [2.0, 2.0, 0.0]])
    found = log10_radii(logits, head, log10_constant=2.0)
    by_hand = min(4.0 / 5.0, 0.5 / 3.0) / (math.sqrt(2) * 100)
    assert float(found[0]) == pytest.approx(math.log10(by_hand), abs=1e-9)
    assert float(found[1]) == -math.inf  # a tie


def test_a_move_within_the_certified_radius_changes_no_prediction(lipschitz: Any) -> None:
    """Against an attack on the margin itself, along its gradient, at every token."""
    model = lipschitz.double()
    certificate = certify(model, radius_rms=2 * certify(model).radius_rms)
    x = model.model.embed_tokens.weight[torch.arange(8)][None].detach().requires_grad_()
    logits = model(inputs_embeds=x).logits[0]
    constant = certificate.log10["hidden_rms"] + math.log10(certificate.head["scale"])
    radii = log10_radii(logits.detach(), model.lm_head.weight.detach(), constant)
    for token in range(8):
        first, second = logits[token].topk(2).values
        (g,) = torch.autograd.grad(first - second, x, retain_graph=True)
        step = g / torch.linalg.vector_norm(g, dim=-1, keepdim=True).clamp_min(1e-300)
        moved = x - 0.999 * 10 ** float(radii[token]) * math.sqrt(x.shape[-1]) * step
        after = model(inputs_embeds=moved).logits[0, token].detach()
        assert after.argmax() == logits[token].argmax()
        assert float(after.max() - after.topk(2).values[1]) < float((first - second).detach()), (
            "it moved towards a change"
        )


def test_the_least_distance_of_two_embeddings_leaves_equal_rows_out() -> None:
    table = torch.tensor([[1.0, 1.0], [1.0, 1.0], [4.0, 5.0], [1.0, 3.0]])
    assert smallest_half_distance(table) == pytest.approx(2 / math.sqrt(2) / 2)
    assert smallest_half_distance(torch.ones(3, 2)) == math.inf


def test_a_section_takes_the_place_of_its_forerunner() -> None:
    card = "# M\n\n## Use\n\nso\n\n## Training\n\nthus\n"
    once = with_section(card, "## New\n\n1\n")
    assert once == "# M\n\n## Use\n\nso\n\n## Training\n\nthus\n\n## New\n\n1\n"
    assert with_section(once, "## New\n\n2\n") == once.replace("1", "2")
    assert with_section(card, "## Use\n\nthen\n") == "# M\n\n## Use\n\nthen\n\n## Training\n\nthus\n"
