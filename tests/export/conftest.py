from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from llmnorm.checkpoint import CheckpointStore, model_tensors
from llmnorm.modeling import LlmNormConfig, LlmNormForCausalLM, initialize_weights

SAMPLE = Path(__file__).resolve().parents[2] / "samples" / "tinyshakespeare" / "validation.txt"
VOCAB_SIZE = 320


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train([str(SAMPLE)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )


def build(norm: str | list[str] = "pre_rmsnorm", seed: int = 0, **keys: Any) -> LlmNormForCausalLM:
    """A tiny model whose gains, shifts and logits are far from their initial values."""
    sizes = {
        "vocab_size": VOCAB_SIZE,
        "true_vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    model = LlmNormForCausalLM(LlmNormConfig(**{**sizes, **keys}, norm=norm))
    initialize_weights(model, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
            else:
                parameter.mul_(6)
    return model.eval()


@pytest.fixture(scope="session")
def make_model() -> Callable[..., LlmNormForCausalLM]:
    return build


@pytest.fixture
def make_run(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Callable[..., Path]:
    """A run directory with one checkpoint of a model, as the training loop leaves it."""
    import json

    def make(model: LlmNormForCausalLM, name: str = "run", step: int = 7) -> Path:
        run = tmp_path / name
        store = CheckpointStore(run / "checkpoints", asynchronous=False)
        config = json.dumps(model.config.to_dict())
        store.save(step, model_tensors(model), {"step": step}, {"model_config.json": config})
        store.wait()
        (run / "config.yaml").write_text(
            "seed: 0\noptimizer: {name: adamw, lr: 1e-05}\ndata: {sequence_length: 64}\n"
        )
        rows = [{"step": 0, "eval/loss": 5.5, "eval/perplexity": 244.7, "eval/tokens": 10}]
        rows += [{"step": i, "tokens": 64 * i, "loss": 5.0 - 0.1 * i, "lr": 1e-5} for i in range(1, step + 1)]
        rows += [{"step": step, "eval/loss": 4.0, "eval/perplexity": 54.6, "eval/tokens": 10}]
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        tokenizer.save_pretrained(run / "tokenizer")
        return run

    return make
