"""HyperMoE decoder language model as a Transformers model, on one device and ignorant of ranks.

Shape legend: B batch, S sequence, T tokens (B * S), D hidden size, h heads, d head width, V vocabulary.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import ModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

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


@dataclass
class HyperMoEModelOutput(ModelOutput):
    """Output of the decoder.

    Attributes:
        last_hidden_state: [B, S, D] after the final norm.
        past_key_values: the cache, when one is used.
        routing: per MoE layer what its router decided.
        branch_norms: per MoE layer ||MoE block's output|| and ||HyperExperts' output||, [2];
            only when asked for.
    """

    last_hidden_state: Tensor | None = None
    past_key_values: Cache | None = None
    routing: tuple[Routing, ...] | None = None
    branch_norms: tuple[Tensor, ...] | None = None


@dataclass
class HyperMoECausalLMOutput(ModelOutput):
    """Output of the language model.

    Attributes:
        loss: lm_loss plus the weighted routing losses; given labels.
        lm_loss: mean cross-entropy in nats per token.
        aux_loss: load-balancing loss, mean over the MoE layers (1 when the load is even).
        z_loss: router z-loss, mean over the MoE layers.
        logits: [B, S, V]; None where the loss was asked for without them.
        past_key_values: the cache, when one is used.
        router_logits: per MoE layer [T, N]; when asked for.
        selected_experts: per MoE layer [T, K]; when asked for.
        branch_norms: per MoE layer ||MoE block's output|| and ||HyperExperts' output||, [2]; when asked for.
    """

    loss: Tensor | None = None
    lm_loss: Tensor | None = None
    aux_loss: Tensor | None = None
    z_loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    router_logits: tuple[Tensor, ...] | None = None
    selected_experts: tuple[Tensor, ...] | None = None
    branch_norms: tuple[Tensor, ...] | None = None


def rotary_tables(positions_BS: Tensor, width: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, S, width] of the rotary embedding (RoFormer, arXiv 2104.09864).

    Made anew in fp32 on each pass: a buffer would be rounded when the model is cast to bf16.
    """
    exponent_d = torch.arange(0, width, 2, device=positions_BS.device, dtype=torch.float32) / width
    angle_BSd = positions_BS.unsqueeze(-1).float() * base**-exponent_d
    angle_BSd = torch.cat([angle_BSd, angle_BSd], dim=-1)
    return angle_BSd.cos().to(dtype), angle_BSd.sin().to(dtype)


def rotate(x_BhSd: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate each pair (x_i, x_{i + d/2}) by its position's angle."""
    cos_BSd, sin_BSd = rotary
    first, second = x_BhSd.chunk(2, dim=-1)
    return x_BhSd * cos_BSd.unsqueeze(1) + torch.cat([-second, first], dim=-1) * sin_BSd.unsqueeze(1)


class Attention(nn.Module):
    """Causal grouped-query attention through scaled-dot-product attention."""

    is_causal = True

    def __init__(self, config: HyperMoEConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        queries, keys = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.o_proj = ResidualLinear(queries, config.hidden_size, bias=False)
        self.norm_widths = (self.head_dim, self.head_dim) if config.qk_norm_scope == "head" else (queries, keys)
        self.q_norm, self.k_norm = (
            nn.RMSNorm(width, eps=config.rms_norm_eps) if config.qk_norm else nn.Identity()
            for width in self.norm_widths
        )

    def forward(
        self,
        x_BSD: Tensor,
        rotary: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
    ) -> Tensor:
        B, S, _ = x_BSD.shape
        heads = (B, S, -1, self.head_dim)
        over_queries, over_keys = ((B, S, -1, width) for width in self.norm_widths)
        q_BShd = self.q_norm(self.q_proj(x_BSD).view(over_queries)).view(heads)
        k_BShd = self.k_norm(self.k_proj(x_BSD).view(over_keys)).view(heads)
        q_BhSd, k_BhSd = rotate(q_BShd.transpose(1, 2), rotary), rotate(k_BShd.transpose(1, 2), rotary)
        v_BhSd = self.v_proj(x_BSD).view(heads).transpose(1, 2)
        if past_key_values is not None:
            k_BhSd, v_BhSd = past_key_values.update(k_BhSd, v_BhSd, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, ALL_ATTENTION_FUNCTIONS["sdpa"]
        )
        y_BShd, _ = attend(self, q_BhSd, k_BhSd, v_BhSd, attention_mask, scaling=self.head_dim**-0.5, dropout=0.0)
        output: Tensor = self.o_proj(y_BShd.reshape(B, S, -1))
        return output


class DecoderLayer(GradientCheckpointingLayer):
    """Pre-norm attention, then a dense SwiGLU or a Mixture of Experts with its HyperExperts."""

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
        output_branch_norms: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Return the residual stream, a MoE layer's logits and selection and, if asked for, its branch norms.

        Takes, generated, and returns bare tensors: reentrant activation checkpointing cuts off the graph what is
        wrapped in an object.
        """
        x_BSD = x_BSD + self.self_attn(self.input_layernorm(x_BSD), rotary, attention_mask, past_key_values)
        hidden_BSD = self.post_attention_layernorm(x_BSD)
        if not self.is_moe:
            return x_BSD + self.mlp(hidden_BSD), None, None, None

        weights = HyperExpertWeights(*generated) if generated else None
        seen: list[Routing] = []
        branch: list[Tensor] = []

        def decided(routing: Routing) -> None:
            seen.append(routing)
            if self.hyper_experts is not None:
                branch.append(self._start_branch(hidden_BSD.flatten(0, 1), routing, hypernetwork, weights, kept))

        y_BSD = run_observed(self.mlp, hidden_BSD, decided)
        norms = None
        for hyper_TD in branch:
            if self.hyper_stream is not None:
                torch.cuda.current_stream().wait_stream(self.hyper_stream)
                hyper_TD.record_stream(torch.cuda.current_stream())
            if output_branch_norms:
                norms = torch.stack([y_BSD.detach().float().norm(), hyper_TD.detach().float().norm()])
            y_BSD = y_BSD + hyper_TD.view_as(y_BSD)
        return x_BSD + y_BSD, seen[0].logits_TN, seen[0].selected_TK, norms

    def _start_branch(
        self,
        hidden_TD: Tensor,
        routing: Routing,
        hypernetwork: SharedHyperNetwork | None,
        weights: HyperExpertWeights | None,
        kept: KeptHyperExperts | None,
    ) -> Tensor:
        """The HyperExperts' output; on a stream of its own, beside the tokens' way to their experts.

        Only what reads no parameter runs there: their gradients are gathered and reduced on the main stream.
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
            tensor.record_stream(stream)  # the backward pass reads them there again
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

    @torch.no_grad()
    def _init_weights(self, module: Any) -> None:
        """Normal weights, smaller where a block writes to the residual stream (GPT-2's 1/sqrt(2L)).

        Only modules with parameters of their own arrive here: Transformers passes over the others.
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
    """Embedding, decoder layers and final norm, with the hypernetwork that the layers share."""

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

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        kept_hyper_experts: KeptHyperExperts | None = None,
        output_branch_norms: bool = False,
        **_: Any,
    ) -> HyperMoEModelOutput:
        """Run the decoder on input_ids [B, S] or inputs_embeds [B, S, D].

        `kept_hyper_experts` is where `generate` keeps HyperExperts between its passes.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x_BSD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            start = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(start, start + x_BSD.shape[1], device=x_BSD.device).unsqueeze(0)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=x_BSD,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        rotary = rotary_tables(position_ids, self.config.head_dim, self.config.rope_theta, x_BSD.dtype)

        kept = None if torch.is_grad_enabled() else kept_hyper_experts
        ahead = iter(self._generate_ahead(x_BSD, kept))
        shared = SharedHyperNetwork(self.hypernetwork) if self.hypernetwork is not None else None
        routings, norms = [], []
        for layer in self.layers:
            x_BSD, logits_TN, selected_TK, layer_norms = layer(
                x_BSD,
                shared,
                rotary,
                *(next(ahead, ()) if layer.is_moe else ()),
                attention_mask=mask,
                past_key_values=past_key_values,
                kept=kept,
                output_branch_norms=output_branch_norms,
            )
            if logits_TN is not None:
                routings.append(Routing(logits_TN, selected_TK))
            if layer_norms is not None:
                norms.append(layer_norms)
        return HyperMoEModelOutput(
            last_hidden_state=self.norm(x_BSD),
            past_key_values=past_key_values,
            routing=tuple(routings),
            branch_norms=tuple(norms) or None,
        )

    def _generate_ahead(self, x_BSD: Tensor, kept: KeptHyperExperts | None) -> list[HyperExpertWeights]:
        """Each MoE layer's generated modules, or nothing where the layers see to it themselves."""
        if self.hypernetwork is None:
            return []
        branches = [layer.hyper_experts for layer in self.layers if isinstance(layer.hyper_experts, HyperExperts)]
        x_TD, top_k = x_BSD.flatten(0, 1), self.config.num_experts_per_tok
        return generate_ahead(branches, self.hypernetwork, x_TD, top_k, kept) or []


class HyperMoEForCausalLM(HyperMoEPreTrainedModel, GenerationMixin):
    """HyperMoE language model with its output projection and losses.

    Attributes:
        sum_over_ranks: sums a tensor over the data-parallel ranks; set from outside when
            `router_aux_loss_scope` is "data_parallel".
    """

    accepts_loss_kwargs = False  # the loss is a mean over this batch's tokens, whatever a Trainer accumulates
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 (read by Transformers)

    def __init__(self, config: HyperMoEConfig) -> None:
        super().__init__(config)
        self.model = HyperMoEModel(config)
        self.lm_head = LMHead(config.hidden_size, config.vocab_size)
        self.sum_over_ranks: Callable[[Tensor], Tensor] | None = None
        self._kept: KeptHyperExperts | None = None
        self.post_init()

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Transformers' `generate`; in evaluation mode its own forward passes keep the HyperExperts that they generate.

        No other pass uses these, so that adapters, weights and modules may change between two calls.
        """
        self._kept = None if self.training else KeptHyperExperts()
        try:
            return super().generate(*args, **kwargs)
        finally:
            self._kept = None

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The arguments of the next forward pass of `generate`."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(*args, **kwargs)
        return inputs if self._kept is None else {**inputs, "kept_hyper_experts": self._kept}

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool = False,
        output_logits: bool = True,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> HyperMoECausalLMOutput:
        """Predict the next token.

        Args:
            input_ids: [B, S].
            attention_mask: [B, S], 0 at padding, which takes no part in any loss.
            position_ids: [B, S]; counted from the cache's length when left out.
            past_key_values: keys and values of earlier tokens.
            inputs_embeds: [B, S, D] in the place of input_ids.
            labels: [B, S], the input ids themselves; -100 is left out of the loss.
            shift_labels: [B, S], labels that are already the next tokens, in the place of `labels`.
            use_cache: return a cache.
            output_router_logits: return router logits, selections and branch norms.
            output_logits: return logits; False computes the loss without ever holding all of them, given labels.
            logits_to_keep: compute logits for the last so many positions only; 0 means all.
            kwargs: handed to the decoder.
        """
        decoded = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_branch_norms=output_router_logits,
            **kwargs,
        )
        kept = slice(-logits_to_keep or None, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden_BSD = decoded.last_hidden_state[:, kept]
        if labels is not None and shift_labels is None:
            shift_labels = F.pad(labels[:, 1:], (0, 1), value=-100)
        logits = self.lm_head(hidden_BSD) if output_logits or shift_labels is None else None

        output = HyperMoECausalLMOutput(logits=logits, past_key_values=decoded.past_key_values)
        if output_router_logits:
            output.router_logits = tuple(routing.logits_TN for routing in decoded.routing)
            output.selected_experts = tuple(routing.selected_TK for routing in decoded.routing)
            output.branch_norms = decoded.branch_norms
        if shift_labels is not None:
            routing, shift_labels = _without_padding(decoded.routing, shift_labels, attention_mask)
            output.loss = output.lm_loss = self._language_loss(hidden_BSD, logits, shift_labels)
            if routing:
                output.aux_loss, output.z_loss = self._routing_losses(routing)
                weighted = self.config.router_aux_loss_coef * output.aux_loss + self.config.z_loss_coef * output.z_loss
                output.loss = output.lm_loss + len(routing) * weighted
        return output

    def _language_loss(self, hidden_BSD: Tensor, logits_BSV: Tensor | None, labels_BS: Tensor) -> Tensor:
        """Mean cross-entropy, of the logits where there are any."""
        if logits_BSV is None:
            chunked: Tensor = self.lm_head(hidden_BSD, labels_BS)
            return chunked
        return F.cross_entropy(logits_BSV.float().flatten(0, 1), labels_BS.flatten(), ignore_index=-100)

    def _routing_losses(self, routing: tuple[Routing, ...]) -> tuple[Tensor, Tensor]:
        """Load-balancing loss and router z-loss, each the mean over the MoE layers."""
        balance = [load_balancing_loss(r.logits_TN, r.selected_TK, self.sum_over_ranks) for r in routing]
        return torch.stack(balance).mean(), torch.stack([router_z_loss(r.logits_TN) for r in routing]).mean()


def _without_padding(
    routing: tuple[Routing, ...], labels_BS: Tensor, attention_mask: Tensor | None
) -> tuple[tuple[Routing, ...], Tensor]:
    """The routing of the tokens alone, and labels that ask nothing of padding. Training has no mask and waits for none.

    Args:
        routing: of all B * S positions.
        labels_BS: the next tokens.
        attention_mask: [B, S] or, with a cache, more; of any other shape it names no padding.
    """
    if attention_mask is None or attention_mask.dim() != 2:
        return routing, labels_BS
    token_BS = attention_mask[:, -labels_BS.shape[1] :].bool()
    token_T = token_BS.flatten()
    kept = tuple(Routing(r.logits_TN[token_T], r.selected_TK[token_T]) for r in routing)
    return kept, labels_BS.masked_fill(~token_BS, -100)


HyperMoEConfig.register_for_auto_class()
HyperMoEForCausalLM.register_for_auto_class("AutoModelForCausalLM")
# Here, and so in exports too: the Trainer's label smoothing (are labels to be shifted?), `transformers serve` and
# lm-evaluation-harness ask this table what kind of model a name is. `AutoModel.register` does not write it.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[HyperMoEConfig.model_type] = HyperMoEForCausalLM.__name__
