"""A certificate with what was measured beside it: as JSON, as a table for a terminal, as a section of a
card.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from llmnorm.evaluation.certificate import NORM_PAIRS, Certificate
from llmnorm.evaluation.certified_radius import certified_radii
from llmnorm.evaluation.lipschitz_attack import lower_bounds
from llmnorm.evaluation.perplexity import TokenStream
from llmnorm.modeling import LlmNormForCausalLM

CERTIFICATE = "certificate.json"  # beside what it is of
ATTACKED = ("logit_difference", "logits_rms")
COLUMNS = ("part", "branch", "factor", "log10 so far", "rms in", "rms out")


def full_certificate(
    model: LlmNormForCausalLM,
    certificate: Certificate,
    text: TokenStream | None = None,
    *,
    attack_texts: Tensor | None = None,
    attack_steps: int = 30,
    context_length: int = 256,
    max_tokens: int = 8192,
    seed: int = 0,
) -> dict[str, Any]:
    """`Certificate.to_dict` with the attack's lower bound (attack_steps 0: none) and the radii of a text.

    attack_texts: token ids [N, tokens] that attacks also start from.
    """
    numbers = certificate.to_dict()
    numbers["log10_lower_bound"] = numbers["log10_tightness"] = None
    if attack_steps:
        found = lower_bounds(
            model, certificate.radius_rms, ATTACKED, texts=attack_texts, steps=attack_steps, seed=seed
        )
        lower = {pair: math.log10(value) if value > 0 else None for pair, value in found.items()}
        numbers["log10_lower_bound"] = first = lower["logit_difference"]
        numbers["log10_lower"] = lower
        numbers["log10_tightness"] = None if first is None else first - certificate.log10_lipschitz
        numbers["attack"] = {"steps": attack_steps, "seed": seed}
    if text is not None:
        numbers["text"] = certified_radii(
            model, certificate, text, context_length=context_length, max_tokens=max_tokens
        )
    return numbers


def certificate_table(numbers: Mapping[str, Any]) -> str:
    """One line for each part, then what was measured and what is not said."""
    lines = [list(COLUMNS)]
    for layer in numbers["layers"]:
        values = (layer["branch"], layer["factor"], layer["log10_so_far"], layer["rms_in"], layer["rms_out"])
        lines.append([layer["name"], *(f"{value:.4g}" for value in values)])
    head = numbers["head"]["largest_difference_per_rms"]
    lines.append(["logits", "", f"{head:.4g}", f"{numbers['log10_lipschitz']:.4g}", "", ""])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = [
        "  ".join(
            [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]
        ).rstrip()
        for line in lines
    ]
    return "\n".join([*table, "", *_sentences(numbers), "", *numbers["not_said"]])


def _sentences(numbers: Mapping[str, Any]) -> list[str]:
    domain, tokens = numbers["domain"]["largest_embedding_rms_allowed"], numbers["domain"]["tokens"]
    lines = [
        f"log10 L = {numbers['log10_lipschitz']:.4f}: {numbers['norm_pair']}",
        f"formula {numbers['formula']}: {numbers['formula_is']}",
        f"domain: embeddings of RMS up to {domain:.6g}, "
        f"{f'at most {tokens}' if tokens else 'any number of'} tokens",
    ]
    for pair in ("logits_rms", "hidden_rms"):
        lines.append(f"log10 {numbers['log10'][pair]:.4f}: {NORM_PAIRS[pair]}")
    if numbers["log10_lower_bound"] is not None:
        gap = -numbers["log10_tightness"]
        verdict = f"so the bound is at most 10^{gap:.2f} too large" if gap >= 0 else "so this is NOT a bound"
        lines.append(f"attack: log10 L is at least {numbers['log10_lower_bound']:.4f}, {verdict}")
    if "text" in numbers:
        lines.append(_radius_sentence(numbers["text"]))
    return lines


def _radius_sentence(text: Mapping[str, Any]) -> str:
    median, half = text["log10_radius_rms"]["median"], text["smallest_half_distance_rms"]
    radius = "0" if median is None else f"10^{median:.2f}"
    line = f"median certified radius over {text['tokens']:,} tokens: {radius} RMS"
    if half is None:
        return f"{line}; no two embeddings differ"
    share = 100 * text["share_beyond_half_distance"]
    return f"{line}; {share:.2f} % are above {half:.3g}, half the least distance of two embeddings"


def certificate_section(numbers: Mapping[str, Any]) -> str:
    """Markdown for a model card: the claim, the factors, what it does not say."""
    facts = "".join(f"- {line}\n" for line in _sentences(numbers))
    rows = "".join(
        f"| {layer['name']} | {layer['branch']:.4g} | {layer['factor']:.4g} | {layer['log10_so_far']:.4g} |\n"
        for layer in numbers["layers"]
    )
    limits = "".join(f"- {line}\n" for line in numbers["not_said"])
    return (
        f"## Lipschitz certificate\n\n{facts}\n"
        f"| part | branch | factor | log10 so far |\n|---|---|---|---|\n{rows}\n"
        f"What it does not say:\n\n{limits}\nEvery number is in `certificate.json`.\n"
    )
