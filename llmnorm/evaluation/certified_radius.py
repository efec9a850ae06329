"""How far the embeddings of a text may move before a prediction can change, by a certificate.

    radius_t = min_{b != a} (z_a - z_b) / (||u_a - u_b||_2 sqrt(D) s L)

at token t with logits z and largest entry a, rows u of the head, s its scale and L the constant from
embeddings to what the head reads, RMS to RMS. If every embedding moves by less than that (RMS, inside the
ball of the certificate), the largest logit stays a.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmnorm.errors import UserError
from llmnorm.evaluation.certificate import Certificate
from llmnorm.evaluation.perplexity import TokenStream
from llmnorm.evaluation.precision import device_of, inference
from llmnorm.modeling import LlmNormForCausalLM

ROWS_AT_A_TIME = 1024


def log10_radii(logits: Tensor, head: Tensor, log10_constant: float) -> Tensor:
    """log10 of the radius of each row of logits [N, V], in fp64; -inf where two logits tie.

    head [V, D]. log10_constant: of s L.
    """
    rows = head.double()
    squares = rows.square().sum(1)
    z = logits.double()
    top = z.argmax(1)
    # Rounding is added, so that a distance is never too small and a radius never too large.
    rounding = 1e-12 * squares.max()
    distance = ((squares[top, None] + squares - 2 * rows[top] @ rows.T).clamp_min(0) + rounding).sqrt()
    margin = z.gather(1, top[:, None]) - z
    ratio = margin / distance
    ratio.scatter_(1, top[:, None], torch.inf)
    return ratio.amin(1).log10() - log10_constant - math.log10(math.sqrt(rows.shape[1]))


def smallest_half_distance(table: Tensor) -> float:
    """Half the least RMS distance of two different rows of the embedding [V, D]; inf if there are none."""
    rows = table.double()
    squares = rows.square().sum(1)
    least = math.inf
    for start in range(0, rows.shape[0], ROWS_AT_A_TIME):
        some = slice(start, start + ROWS_AT_A_TIME)
        distances = squares[some, None] + squares - 2 * rows[some] @ rows.T
        # What rounding leaves of equal rows, and of a row and itself, is no distance.
        distances[distances <= 1e-12 * squares.max()] = math.inf
        least = min(least, float(distances.min()))
    return math.sqrt(least / rows.shape[1]) / 2


def certified_radii(
    model: LlmNormForCausalLM,
    certificate: Certificate,
    text: TokenStream,
    *,
    context_length: int = 256,
    max_tokens: int = 8192,
) -> dict[str, Any]:
    """Quantiles of log10 radius over the tokens of a text, and the share that a token exchange could not
    reach.

    Raises UserError for an empty text and for a certificate that is none.
    """
    if certificate.formula != "per_head":
        raise UserError(
            f"formula={certificate.formula} gives no bound, hence no radius; use formula=per_head."
        )
    count = min(text.num_tokens, max_tokens)
    if count < 1:
        raise UserError("the text has no tokens, so it has no radius; give another --data.")
    constant = certificate.log10["hidden_rms"] + math.log10(certificate.head["scale"])
    found: list[Tensor] = []
    with inference(model) as module:
        head = module.lm_head.weight  # type: ignore[union-attr]
        for start in range(0, count, context_length):
            ids = np.asarray(text.read(start, min(start + context_length, count)), dtype=np.int64)
            batch = torch.from_numpy(ids)[None].to(device_of(model))
            logits = module(input_ids=batch, use_cache=False).logits[0]
            for some in logits.split(ROWS_AT_A_TIME):
                found.append(log10_radii(some, head, constant).cpu())  # type: ignore[arg-type]
        half = smallest_half_distance(module.model.embed_tokens.weight)  # type: ignore[union-attr, arg-type]
    radii = torch.cat(found)
    levels = torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)
    low, median, high = (
        _finite(value) for value in torch.quantile(radii, levels, interpolation="nearest").tolist()
    )
    return {
        "tokens": count,
        "context_length": context_length,
        "log10_radius_rms": {"0.05": low, "median": median, "0.95": high},
        "smallest_half_distance_rms": _finite(half),
        "share_beyond_half_distance": float((radii > math.log10(half)).double().mean()),
    }


def _finite(value: float) -> float | None:
    """JSON has no infinity: null is a tie, the radius 0."""
    return value if math.isfinite(value) else None
