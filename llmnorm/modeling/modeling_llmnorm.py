"""The model: embedding, layers that follow the block equation, head. It only assembles the other files.

Shapes: B sequences, T tokens, d = hidden_size, V = vocab_size. Names and calls are Llama's in transformers.
"""

# ruff: noqa: RUF012  (mypy takes transformers' declarations for instance variables, which ClassVar may not override)

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .activation_checkpointing import CHECKPOINTING_MODES
from .attention import LlmNormAttention, document_boundaries
from .batch_statistics import batch_norms, no_token_set, observer, token_set
from .block import LlmNormBlock, stream_casts, stream_widths
from .configuration_llmnorm import LlmNormConfig
from .equation import identity
from .fused import linear_loss, serves
from .hypersphere import logit_scale, make_unit
from .initialization import initialize_module, initialize_weights, set_roles
from .mup import output_multiplier
from .norms import make_norm
from .recurrent_cache import make_cache, with_lengths
from .residual import residual_plan
from .rotary import LlmNormRotaryEmbedding
from .sequence_inputs import linear_inputs, softmax_mask
from .weight_constraint import keeps_norms
from .zero_mean import stream_linears

IGNORED = -100  # label of a token that is not scored


class LlmNormPreTrainedModel(PreTrainedModel):
    config: LlmNormConfig
    config_class = LlmNormConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LlmNormBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": LlmNormBlock,
        "attentions": LlmNormAttention,
    }

    def _init_weights(self, module: nn.Module) -> None:
        initialize_module(module, self.config)

    def set_activation_checkpointing(self, mode: str) -> None:
        """Trade memory for time in training; values and gradients stay the same.

        none: keep all activations. full: keep each layer's input and compute the layer again in the backward
        pass. selective: also keep the matrix products and the attention outputs, and compute only the rest
        again.
        """
        if mode not in CHECKPOINTING_MODES:
            known = ", ".join(CHECKPOINTING_MODES)
            raise ValueError(f"activation_checkpointing={mode!r} is not a choice; known are {known}")
        options = CHECKPOINTING_MODES[mode]
        run = partial(
            checkpoint,
            use_reentrant=False,
            preserve_rng_state=self.config.attention_dropout > 0,
            **(options or {}),
        )
        self._set_gradient_checkpointing(enable=options is not None, gradient_checkpointing_func=run)


class LlmNormModel(LlmNormPreTrainedModel):
    """Embedding, its norm if any, layers and final norm: input_ids [B, T] -> last_hidden_state [B, T, d].

    `inputs_embeds` and `last_hidden_state` of a compressed stream have d - 1 features; between them the
    stream has zeros behind these, see `zero_mean.py`.
    """

    def __init__(self, config: LlmNormConfig) -> None:
        super().__init__(config)
        config.validate_architecture()
        plan = residual_plan(config.norm, config.norm_options, config.num_hidden_layers)
        # An embedding's padding row is never trained, so a padding id that also ends documents is not one.
        ends = {config.bos_token_id, *_as_list(config.eos_token_id)}
        self.padding_idx = None if config.pad_token_id in ends else config.pad_token_id
        self.vocab_size = config.vocab_size

        self.embed_tokens = nn.Embedding(config.vocab_size, config.stream_width, self.padding_idx)
        self.embed_norm = (
            make_norm(
                plan.embedding_norm,
                config.stream_width,
                config.rms_norm_eps,
                settings=plan.embedding_norm_settings,
            )
            if plan.embedding_norm
            else identity
        )
        self.layers = nn.ModuleList(LlmNormBlock(config, i, layer) for i, layer in enumerate(plan.layers))
        self.norm = (
            make_norm(
                plan.final_norm,
                config.stream_width,
                config.rms_norm_eps,
                settings=plan.final_norm_settings,
            )
            if plan.final_norm
            else nn.Identity()
        )
        self.observe = observer(self.norm)
        self.token_set = token_set if any(batch_norms(self)) else no_token_set
        self.rotary_emb = LlmNormRotaryEmbedding(config)
        self.has_softmax = "full_attention" in config.layer_types
        self.has_linear = "linear_attention" in config.layer_types
        self._is_stateful = self.has_linear  # transformers then refuses to roll the cache back
        self.gradient_checkpointing = False
        self.to_stream, self.to_branch = stream_casts(config)
        self.open_stream, self.close_stream = stream_widths(config)
        set_roles(self, 0, embed_tokens="embedding")
        if plan.unit_embeddings:
            make_unit(self, embed_tokens=1)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        token_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        x = self.embed_norm(self.open_stream(self.to_stream(inputs_embeds)))

        tokens = self.token_set(x, token_mask, attention_mask, position_ids)
        # The masks come before the cache, and get no position_ids of our own making: looking for restarts
        # synchronizes with the device.
        inputs = (self.config, inputs_embeds, attention_mask, past_key_values, position_ids)
        causal_mask = softmax_mask(*inputs)
        more: dict[str, Any] = {}
        if self.has_linear:
            more["linear_inputs"], linear_positions = linear_inputs(*inputs)
            if linear_positions is not None:
                rotary = self._rotary(inputs_embeds, linear_positions)
                more["linear_inputs"] = more["linear_inputs"]._replace(position_embeddings=rotary)
        flash = "flash" in str(self.config._attn_implementation)
        if flash and position_ids is not None and attention_mask is None and past_key_values is None:
            kwargs.update(document_boundaries(position_ids, inputs_embeds.shape[0]))
        if use_cache and past_key_values is None:
            past_key_values = make_cache(self.config)
        if self.has_softmax:
            if position_ids is None:
                seen = past_key_values.get_seq_length() if past_key_values is not None else 0
                position_ids = (torch.arange(x.shape[1], device=x.device) + seen).unsqueeze(0)
            more["position_embeddings"] = self._rotary(inputs_embeds, position_ids)

        for layer in self.layers:
            x = layer(
                x,
                attention_mask=causal_mask,
                past_key_values=past_key_values,
                tokens=tokens,
                **more,
                **kwargs,
            )
        self.observe(tokens)
        x = self.close_stream(self.to_branch(self.norm(x), self.embed_tokens))
        return BaseModelOutputWithPast(last_hidden_state=x, past_key_values=past_key_values)

    def _rotary(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self.rotary_emb(x, position_ids)
        return cos.unsqueeze(1), sin.unsqueeze(1)


def _as_list(value: int | list[int] | None) -> list[int]:
    return value if isinstance(value, list) else [] if value is None else [value]


class LlmNormForCausalLM(LlmNormPreTrainedModel, GenerationMixin):
    """The language model: input_ids [B, T] -> logits [B, T, V] and, with labels, the loss.

    loss is the mean over labels that are not -100 of -log p(label); `num_items_in_batch` divides the sum
    instead of their number. `labels` are shifted here; `shift_labels` are taken as they are, [B, T]. Where
    `position_ids` restart inside a row and there is no attention_mask, attention does not cross the restart.
    With `return_logits=False` and labels, the loss alone is returned (logits are None), which spares a GPU
    the B * T * V logits.

    token_mask [B, T] says which tokens the statistics of PowerNorm, Unified Norm and PRepBN are over in
    training: by default those that attention_mask keeps, or else those whose label is not -100.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    initial_norms: Tensor

    def __init__(self, config: LlmNormConfig) -> None:
        super().__init__(config)
        self.model = LlmNormModel(config)
        self.vocab_size = config.vocab_size
        self._is_stateful = self.model.has_linear
        reader, _ = stream_linears(config)
        head_bias = bool(config.norm_options.get("head_bias"))
        self.lm_head = reader(config.stream_width, config.vocab_size, bias=head_bias)
        self.output_multiplier = output_multiplier(config)
        set_roles(self, 0, lm_head="lm_head")
        plan = residual_plan(config.norm, config.norm_options, config.num_hidden_layers)
        if plan.unit_embeddings:
            make_unit(self, lm_head=1)
        self.logit_scale = (
            logit_scale(config.vocab_size, config.hidden_size) if plan.scaled_logits else identity
        )
        # normalize_and_project: the Frobenius norm that each parameter returns to, nan where there is none.
        if keeps_norms(config):
            number = len(list(self.parameters()))
            self.register_buffer("initial_norms", torch.full((number,), torch.nan, dtype=torch.float64))
        if config.true_vocab_size is not None and config.true_vocab_size < config.vocab_size:
            self.generation_config.suppress_tokens = list(range(config.true_vocab_size, config.vocab_size))
        self.post_init()

    def rebuild_buffers(self) -> None:
        if keeps_norms(self.config):
            self.initial_norms.fill_(torch.nan)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """transformers' own; afterwards every row counts as a token, so none is kept from `generate`.

        Raises ValueError where rows of the embedding must have unit length, which transformers cannot know.
        """
        if hasattr(self.model.embed_tokens, "project_weights_"):
            raise ValueError(
                f"norm={self.config.norm} keeps the rows of the embedding at unit length, so its vocabulary "
                "cannot be resized; give vocab_size when the model is made"
            )
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        self.config.true_vocab_size = None
        self.generation_config.suppress_tokens = None
        return embeddings

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: Any, *args: Any) -> Any:
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)  # type: ignore[misc]
        if self.model.has_linear and isinstance(model_kwargs.get("past_key_values"), Cache):
            with_lengths(model_kwargs["past_key_values"])

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        shift_labels: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        return_logits: bool = True,
        token_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        has_labels = labels is not None or shift_labels is not None
        if not (return_logits or has_labels):
            raise ValueError("return_logits=False leaves nothing to return without labels; pass labels")
        targets = labels if shift_labels is None else shift_labels
        if token_mask is None and attention_mask is None and targets is not None:
            token_mask = targets != IGNORED
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            token_mask=token_mask,
            **kwargs,
        )
        # logits_to_keep: the last so many positions (0: all), or the positions themselves.
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden = outputs.last_hidden_state[:, kept, :]
        if self.output_multiplier != 1.0:
            hidden = hidden * self.output_multiplier

        logits = loss = None
        whole = self.lm_head.bias is None and self.logit_scale is identity
        if not return_logits and serves(hidden) and whole:
            loss = linear_loss(hidden, self.lm_head.weight, labels, shift_labels, num_items_in_batch)
        else:
            logits = self.logit_scale(self.lm_head(hidden))
        if has_labels and loss is None:
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=self.config.vocab_size,
                shift_labels=shift_labels.contiguous() if shift_labels is not None else None,
                num_items_in_batch=num_items_in_batch,
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits if return_logits else None,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


__all__ = ["LlmNormForCausalLM", "LlmNormModel", "LlmNormPreTrainedModel", "initialize_weights"]
