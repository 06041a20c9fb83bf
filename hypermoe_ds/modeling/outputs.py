"""Outputs of the decoder and the language model.

Shape legend: B batch size, S sequence length, T tokens (B * S), D hidden size, h heads, V vocabulary size, N experts,
K experts per token.
"""

from dataclasses import dataclass

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast


@dataclass
class HyperMoEModelOutput(BaseModelOutputWithPast):
    """Output of the decoder.

    Attributes:
        last_hidden_state: [B, S, D] after the final norm.
        past_key_values: the key-value cache, if one is used.
        hidden_states: embeddings and the output of each layer [B, S, D], if requested. The final norm is applied to the
            last output.
        attentions: attention weights of each layer [B, h, S, S], if requested. Only "eager" attention returns weights.
        router_logits: router logits of each MoE layer [T, N], if requested.
        selected_experts: selected experts of each MoE layer [T, K]; returned together with the router logits.
        hyper_expert_norms: norms of the expert output and the HyperExpert output in each MoE layer [2], if requested.
    """

    router_logits: tuple[Tensor, ...] | None = None
    selected_experts: tuple[Tensor, ...] | None = None
    hyper_expert_norms: tuple[Tensor, ...] | None = None


@dataclass
class HyperMoECausalLMOutput(CausalLMOutputWithPast):
    """Output of the language model.

    Attributes:
        loss: lm_loss plus the weighted routing losses, if labels are given.
        logits: [B, S, V]; None with `output_logits=False`.
        past_key_values, hidden_states, attentions: as in `HyperMoEModelOutput`.
        lm_loss: mean cross-entropy in nats per token. With `num_items_in_batch`, `lm_loss` and `loss` are this
            batch's contributions to the means over that many tokens.
        aux_loss: load-balancing loss, averaged over the MoE layers (1 if the load is balanced).
        z_loss: router z-loss, averaged over the MoE layers.
        router_logits, selected_experts, hyper_expert_norms: as in `HyperMoEModelOutput`.
    """

    lm_loss: Tensor | None = None
    aux_loss: Tensor | None = None
    z_loss: Tensor | None = None
    router_logits: tuple[Tensor, ...] | None = None
    selected_experts: tuple[Tensor, ...] | None = None
    hyper_expert_norms: tuple[Tensor, ...] | None = None
