"""Decoder-only HyperMoE language model for Transformers, on one device.

Shape legend: B batch size, S sequence length, T tokens (B * S), D hidden size, h heads, d head dimension, V vocabulary.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults

from .attention import Attention, rotary_tables
from .configuration_hypermoe import HyperMoEConfig
from .generated import HyperExpertWeights
from .hyper_cache import KeptHyperExperts
from .hyper_costs import Sizes
from .hyper_experts import (
    BakedHyperExperts,
    HyperExperts,
    HyperNetwork,
    SelectionEncoder,
    SharedHyperNetwork,
    generate_ahead,
)
from .lm_head import LMHead
from .moe import Experts, MoEBlock, ResidualLinear, Routing, SwiGLU, load_balancing_loss, router_z_loss, run_observed
from .outputs import HyperMoECausalLMOutput, HyperMoEModelOutput


class DecoderLayer(GradientCheckpointingLayer):
    """Pre-norm attention, followed by a dense SwiGLU or a Mixture of Experts with its HyperExperts.

    Attributes:
        skips_hyper_experts: whether to omit the HyperExperts' output.
        hyper_stream: CUDA stream for the HyperExperts; None means the current stream.
    """

    skips_hyper_experts = False

    def __init__(self, config: HyperMoEConfig, layer_idx: int) -> None:
        super().__init__()
        self.is_moe = layer_idx in config.moe_layers
        self.self_attn = Attention(config, layer_idx)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MoEBlock(config) if self.is_moe else SwiGLU(config.hidden_size, config.intermediate_size)
        self.hyper_experts = _hyper_experts(config, layer_idx) if self.is_moe and config.hypernetwork else None
        self.hyper_stream: torch.cuda.Stream | None = None

    def forward(
        self,
        x_BSD: Tensor,
        hypernetwork: SharedHyperNetwork | None,
        rotary: tuple[Tensor, Tensor],
        *generated: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        kept: KeptHyperExperts | None = None,
        output_hyper_expert_norms: bool = False,
        **attention_kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Return the residual stream, attention weights, router logits, selected experts and HyperExpert norms.

        `generated` and the outputs are plain tensors, because reentrant activation checkpointing detaches tensors
        nested in other objects from the graph.
        """
        y_BSD, weights_BhSS = self.self_attn(
            self.input_layernorm(x_BSD), rotary, attention_mask, past_key_values, **attention_kwargs
        )
        x_BSD = x_BSD + y_BSD
        hidden_BSD = self.post_attention_layernorm(x_BSD)
        if not self.is_moe:
            return x_BSD + self.mlp(hidden_BSD), weights_BhSS, None, None, None

        weights = HyperExpertWeights(*generated) if generated else None

        def start_hyper_experts(routing: Routing) -> Tensor | None:
            if self.hyper_experts is None or self.skips_hyper_experts:
                return None
            return self._start_hyper_experts(hidden_BSD.flatten(0, 1), routing, hypernetwork, weights, kept)

        y_BSD, routing, hyper_TD = run_observed(self.mlp, hidden_BSD, start_hyper_experts)
        norms = None
        if hyper_TD is not None:
            if self.hyper_stream is not None:
                torch.cuda.current_stream().wait_stream(self.hyper_stream)
                hyper_TD.record_stream(torch.cuda.current_stream())
            if output_hyper_expert_norms:
                norms = torch.stack([y_BSD.detach().float().norm(), hyper_TD.detach().float().norm()])
            y_BSD = y_BSD + hyper_TD.view_as(y_BSD)
        return x_BSD + y_BSD, weights_BhSS, routing.logits_TN, routing.selected_TK, norms

    def _start_hyper_experts(
        self,
        hidden_TD: Tensor,
        routing: Routing,
        hypernetwork: SharedHyperNetwork | None,
        weights: HyperExpertWeights | None,
        kept: KeptHyperExperts | None,
    ) -> Tensor:
        """Start the computation of the HyperExperts, on `hyper_stream` in parallel with the token dispatch if possible.

        `hyper_stream` is used only if the weights are already generated. Generating weights reads parameters, whose
        gradients are reduced on the main stream.
        """
        assert self.hyper_experts is not None
        run: Callable[[], Tensor] = partial(
            self.hyper_experts,
            hidden_TD,
            routing.selected_TK,
            hypernetwork,
            gates_TK=routing.gates_TK,
            generated=weights,
            kept=kept,
        )
        stream = self.hyper_stream
        if stream is None or weights is None or routing.gates_TK is None:
            return run()
        stream.wait_stream(torch.cuda.current_stream())
        for tensor in (hidden_TD, routing.selected_TK, routing.gates_TK, *weights):
            tensor.record_stream(stream)  # the backward pass also reads these tensors on `stream`
        with torch.cuda.stream(stream):
            return run()


def _hyper_experts(config: HyperMoEConfig, layer_idx: int) -> HyperExperts | BakedHyperExperts:
    if config.baked_hyper_experts:
        sizes = Sizes(config.hidden_size, config.adapter_size, config.bottleneck_size)
        return BakedHyperExperts(config.num_experts, config.hyper_set_size, sizes, config.hyper_conditioning)
    encoder = SelectionEncoder(
        config.num_experts,
        config.expert_embedding_size,
        config.selection_hidden_size,
        config.hypernetwork_input_size,
    )
    return HyperExperts(encoder, config.moe_layers.index(layer_idx), config.hyper_conditioning)


class HyperMoEPreTrainedModel(PreTrainedModel):
    config: HyperMoEConfig
    config_class = HyperMoEConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("DecoderLayer", "HyperNetwork")
    _skip_keys_device_placement = ("past_key_values",)
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module: Any) -> None:
        """Draw normally distributed weights, scaled by 1/sqrt(2L) if they write to the residual stream, as in GPT-2.

        Transformers calls this method only for modules that have parameters of their own.
        """
        std = self.config.initializer_range
        residual_std = std / math.sqrt(2 * self.config.num_hidden_layers)
        if hasattr(module, "keeps_initialisation"):
            module.reset_parameters()
        elif isinstance(module, ResidualLinear):
            nn.init.normal_(module.weight, std=residual_std)
        elif isinstance(module, Experts):
            nn.init.normal_(module.gate_up_proj, std=std)
            nn.init.normal_(module.down_proj, std=residual_std)
        elif isinstance(module, nn.RMSNorm):
            nn.init.ones_(module.weight)
        else:
            nn.init.normal_(module.weight, std=std)


class HyperMoEModel(HyperMoEPreTrainedModel):
    """Embedding, decoder layers and final norm, with the hypernetwork that the layers share.

    Attributes:
        skips_hyper_experts: whether to skip the generation of HyperExperts before the first layer. To omit the output
            of HyperExperts, also set `skips_hyper_experts` of each layer.
    """

    skips_hyper_experts = False

    def __init__(self, config: HyperMoEConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.hypernetwork = None
        if config.hypernetwork and config.moe_layers and not config.baked_hyper_experts:
            self.hypernetwork = HyperNetwork(
                config.hidden_size,
                config.hypernetwork_input_size,
                len(config.moe_layers),
                config.layer_embedding_size,
                config.bottleneck_size,
                config.adapter_size,
            )
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults  # type: ignore[untyped-decorator]
    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        kept_hyper_experts: KeptHyperExperts | None = None,
        output_hyper_expert_norms: bool = False,
        **attention_kwargs: Any,
    ) -> HyperMoEModelOutput:
        """Run the decoder on input_ids [B, S] or inputs_embeds [B, S, D].

        Args:
            kept_hyper_experts: cache of generated HyperExperts between the forward passes of `generate`.
            attention_kwargs: passed to the attention function.

        Raises:
            ValueError: both or neither of input_ids and inputs_embeds are given.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x_BSD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            start = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(x_BSD.shape[1], device=x_BSD.device) + start).unsqueeze(0)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=x_BSD,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        output = self._decode(
            x_BSD,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            output_router_logits=output_router_logits,
            output_hyper_expert_norms=output_hyper_expert_norms,
            attention_mask=mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
            kept=None if torch.is_grad_enabled() else kept_hyper_experts,
            **attention_kwargs,
        )
        output.past_key_values = past_key_values
        return output

    def _decode(
        self,
        x_BSD: Tensor,
        *,
        output_attentions: bool,
        output_hidden_states: bool,
        output_router_logits: bool | None,
        position_ids: Tensor,
        kept: KeptHyperExperts | None,
        **arguments: Any,
    ) -> HyperMoEModelOutput:
        """Run the layers and the final norm, and collect the requested outputs of the layers."""
        rotary = rotary_tables(position_ids, self.config.head_dim, self.config.rope_theta, x_BSD.dtype)
        ahead = iter(self._generate_ahead(x_BSD, kept))
        shared = SharedHyperNetwork(self.hypernetwork) if self.hypernetwork is not None else None
        hidden, attentions, logits, selected, norms = [], [], [], [], []
        for layer in self.layers[: self.config.num_hidden_layers]:  # can be lowered by `assistant_early_exit`
            if output_hidden_states:
                hidden.append(x_BSD)
            x_BSD, weights_BhSS, logits_TN, selected_TK, layer_norms = layer(
                x_BSD,
                shared,
                rotary,
                *(next(ahead, ()) if layer.is_moe else ()),
                kept=kept,
                position_ids=position_ids,
                output_attentions=output_attentions,
                **arguments,
            )
            if output_attentions and weights_BhSS is not None:
                attentions.append(weights_BhSS)
            if logits_TN is not None:
                logits.append(logits_TN)
                selected.append(selected_TK)
            if layer_norms is not None:
                norms.append(layer_norms)
        last_BSD = self.norm(x_BSD)
        return HyperMoEModelOutput(
            last_hidden_state=last_BSD,
            hidden_states=(*hidden, last_BSD) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
            router_logits=tuple(logits) if output_router_logits else None,
            selected_experts=tuple(selected) if output_router_logits else None,
            hyper_expert_norms=tuple(norms) or None,
        )

    def _generate_ahead(self, x_BSD: Tensor, kept: KeptHyperExperts | None) -> list[HyperExpertWeights]:
        """Return the generated weights of each MoE layer, or an empty list if each layer generates its own weights."""
        if self.hypernetwork is None or self.skips_hyper_experts:
            return []
        generating = [layer.hyper_experts for layer in self.layers if isinstance(layer.hyper_experts, HyperExperts)]
        x_TD, top_k = x_BSD.flatten(0, 1), self.config.num_experts_per_tok
        return generate_ahead(generating, self.hypernetwork, x_TD, top_k, kept) or []


class HyperMoEForCausalLM(HyperMoEPreTrainedModel, GenerationMixin):
    """HyperMoE language model with an output projection and losses.

    Attributes:
        sum_over_ranks: function that sums a tensor over the data-parallel ranks; set by the trainer if
            `router_aux_loss_scope` is "data_parallel".
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 (read by Transformers)
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012 (read by Transformers)

    def __init__(self, config: HyperMoEConfig) -> None:
        super().__init__(config)
        self.model = HyperMoEModel(config)
        self.lm_head = LMHead(config.hidden_size, config.vocab_size)
        self.sum_over_ranks: Callable[[Tensor], Tensor] | None = None
        self._kept: KeptHyperExperts | None = None
        self.post_init()

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Call Transformers' `generate`; in evaluation mode, its forward passes share generated HyperExperts.

        The HyperExperts are discarded after the call, so adapters, weights and modules may change between calls.
        """
        self._kept = None if self.training else KeptHyperExperts()
        try:
            return super().generate(*args, **kwargs)
        finally:
            self._kept = None

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the arguments of the next forward pass of `generate`."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(*args, **kwargs)
        return inputs if self._kept is None else {**inputs, "kept_hyper_experts": self._kept}

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        output_logits: bool = True,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> HyperMoECausalLMOutput:
        """Predict the next token at every position.

        Args:
            input_ids: [B, S].
            attention_mask: [B, S], 0 for padding, which all losses ignore.
            position_ids: [B, S]; None continues from the cache. Without a cache, position restarts separate documents.
            past_key_values: cached keys and values of earlier tokens.
            inputs_embeds: [B, S, D], instead of input_ids.
            labels: [B, S], not shifted, usually the input ids; the loss ignores -100.
            use_cache: whether to return a cache; None uses the configuration.
            output_router_logits: whether to return router logits, selections and HyperExpert norms.
            output_logits: whether to return logits. If false and labels are given, the loss is computed in chunks.
            logits_to_keep: number of last positions to compute logits for; 0 means all positions.
            kwargs: `shift_labels` [B, S], shifted labels that replace `labels`; `num_items_in_batch`, the number of
                tokens to divide the loss by; arguments of `HyperMoEModel`.
        """
        # `shift_labels` is not in the signature, because then the Trainer would expect a dataset column of that name.
        shift_labels, num_items = kwargs.pop("shift_labels", None), kwargs.pop("num_items_in_batch", None)
        if labels is not None and shift_labels is None:
            shift_labels = F.pad(labels[:, 1:], (0, 1), value=-100)
        decoded = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=output_router_logits or shift_labels is not None,
            output_hyper_expert_norms=bool(output_router_logits),
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep or None, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden_BSD = decoded.last_hidden_state[:, kept]
        logits = self.lm_head(hidden_BSD) if output_logits or shift_labels is None else None
        losses = self._losses(hidden_BSD, logits, decoded, shift_labels, attention_mask, num_items)
        return HyperMoECausalLMOutput(
            logits=logits,
            past_key_values=decoded.past_key_values,
            hidden_states=decoded.hidden_states,
            attentions=decoded.attentions,
            router_logits=decoded.router_logits if output_router_logits else None,
            selected_experts=decoded.selected_experts if output_router_logits else None,
            hyper_expert_norms=decoded.hyper_expert_norms,
            **losses,
        )

    def _losses(
        self,
        hidden_BSD: Tensor,
        logits_BSV: Tensor | None,
        decoded: HyperMoEModelOutput,
        labels_BS: Tensor | None,
        attention_mask: Tensor | None,
        num_items: Tensor | int | None,
    ) -> dict[str, Tensor]:
        """Return the losses by their names in the output, or an empty dictionary if there are no labels.

        `num_items` is the number of tokens in an accumulated batch. If it is set, the micro-batch losses add up to
        the mean over all tokens of the batch. Routing losses are also weighted by the micro-batch's share of tokens.
        """
        if labels_BS is None:
            return {}
        routing = tuple(map(Routing, decoded.router_logits or (), decoded.selected_experts or ()))
        routing, labels_BS = _without_padding(routing, labels_BS, attention_mask)
        losses = {}
        loss = lm_loss = self._language_loss(hidden_BSD, logits_BSV, labels_BS)
        if routing:
            losses["aux_loss"], losses["z_loss"] = self._routing_losses(routing)
            weighted = self.config.router_aux_loss_coef * losses["aux_loss"]
            weighted = weighted + self.config.z_loss_coef * losses["z_loss"]
            loss = lm_loss + len(routing) * weighted
        if num_items is not None:
            count = (labels_BS != -100).sum()
            # If all labels are -100, the mean loss is NaN, so replace it with zero. The clamp prevents NaN gradients
            # from 0 / 0.
            share = count / torch.as_tensor(num_items, device=count.device).clamp_min(1)
            loss, lm_loss = ((mean * share).masked_fill(count == 0, 0) for mean in (loss, lm_loss))
        return losses | {"loss": loss, "lm_loss": lm_loss}

    def _language_loss(self, hidden_BSD: Tensor, logits_BSV: Tensor | None, labels_BS: Tensor) -> Tensor:
        """Return the mean cross-entropy, computed from the logits if they exist.

        Otherwise, `LMHead` computes the loss in chunks. If an adapter wraps `LMHead`, the logits are computed
        first, because the adapter would pass labels to the inner projection and add its own output to the loss.
        """
        if logits_BSV is None and isinstance(self.lm_head, LMHead):
            chunked: Tensor = self.lm_head(hidden_BSD, labels_BS)
            return chunked
        if logits_BSV is None:
            logits_BSV = self.lm_head(hidden_BSD)
        return F.cross_entropy(logits_BSV.float().flatten(0, 1), labels_BS.flatten(), ignore_index=-100)

    def _routing_losses(self, routing: tuple[Routing, ...]) -> tuple[Tensor, Tensor]:
        """Return the load-balancing loss and the router z-loss, each averaged over the MoE layers."""
        balance = [load_balancing_loss(r.logits_TN, r.selected_TK, self.sum_over_ranks) for r in routing]
        return torch.stack(balance).mean(), torch.stack([router_z_loss(r.logits_TN) for r in routing]).mean()


def _without_padding(
    routing: tuple[Routing, ...], labels_BS: Tensor, attention_mask: Tensor | None
) -> tuple[tuple[Routing, ...], Tensor]:
    """Remove padding from the routing and set the labels of padding tokens to -100.

    Indexing with a mask makes the host wait for the device, but training passes no mask.

    Args:
        routing: routing of all B * S positions.
        labels_BS: the next tokens.
        attention_mask: [B, S], or longer with a cache; a mask that is not two-dimensional is ignored.
    """
    if attention_mask is None or attention_mask.dim() != 2:
        return routing, labels_BS
    token_BS = attention_mask[:, -labels_BS.shape[1] :].bool()
    token_T = token_BS.flatten()
    kept = tuple(Routing(r.logits_TN[token_T], r.selected_TK[token_T]) for r in routing)
    return kept, labels_BS.masked_fill(~token_BS, -100)


HyperMoEConfig.register_for_auto_class()
HyperMoEModel.register_for_auto_class("AutoModel")
HyperMoEForCausalLM.register_for_auto_class("AutoModelForCausalLM")
# The Trainer's label smoothing, `transformers serve` and lm-evaluation-harness look up the model type in these tables.
# `AutoModel.register` does not update the tables. This file updates them, because exports contain this file.
MODEL_MAPPING_NAMES[HyperMoEConfig.model_type] = HyperMoEModel.__name__
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[HyperMoEConfig.model_type] = HyperMoEForCausalLM.__name__
