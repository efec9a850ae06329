"""A paragraph of the model's own, now and then, to see what it has learned."""

from __future__ import annotations

import torch
from transformers import PreTrainedTokenizerBase

from llmnorm.training.parallel import ParallelModel


def sample_text(
    model: ParallelModel, tokenizer: PreTrainedTokenizerBase, prompt: str, max_new_tokens: int, seed: int
) -> str:
    """Continue `prompt` by `max_new_tokens` tokens drawn from the model, and decode the whole.

    Every process calls it (a forward pass of a sharded model is a collective) and draws the same tokens.
    The global random state is left as it was, so sampling never changes the training that follows.
    """
    device = model.processes.device
    ids = tokenizer.encode(prompt, add_special_tokens=False) or [tokenizer.eos_token_id]
    module = model.module
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad(), model.autocast():
        torch.manual_seed(seed)
        module.eval()
        try:
            output = module.generate(  # type: ignore[operator]
                input_ids=torch.tensor([ids], device=device),
                attention_mask=torch.ones(1, len(ids), dtype=torch.int64, device=device),
                do_sample=True,
                max_new_tokens=max_new_tokens,
                pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
            )
        finally:
            module.train()
    return str(tokenizer.decode(output[0], skip_special_tokens=True))
