"""What the decoder and the language model return.

Shape legend: B batch, S sequence, T tokens (B * S), D hidden size, h heads, V vocabulary, N experts, K experts a token.
"""

from dataclasses import dataclass

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast


@dataclass
class HyperMoEModelOutput(BaseModelOutputWithPast):
    """Output of the decoder.

    Attributes:
        last_hidden_state: [B, S, D] after the final norm.
        past_key_values: the cache, when one is used.
        hidden_states: the embeddings and each layer's output [B, S, D], the last after the final norm; when asked for.
        attentions: per layer the attention weights [B, h, S, S]; when asked for. Only "eager" attention makes any.
        router_logits: per MoE layer [T, N]; when asked for.
        selected_experts: per MoE layer [T, K]; when asked for, with the logits.
        branch_norms: per MoE layer ||MoE block's output|| and ||HyperExperts' output||, [2]; when asked for.
    """

    router_logits: tuple[Tensor, ...] | None = None
    selected_experts: tuple[Tensor, ...] | None = None
    branch_norms: tuple[Tensor, ...] | None = None


@dataclass
class HyperMoECausalLMOutput(CausalLMOutputWithPast):
    """Output of the language model.

    Attributes:
        loss: lm_loss plus the weighted routing losses; given labels.
        logits: [B, S, V]; None if the loss was asked for without them.
        past_key_values, hidden_states, attentions: as of `HyperMoEModelOutput`.
        lm_loss: mean cross-entropy in nats per token. Given `num_items_in_batch`, it and `loss` are
            this batch's part of the mean over so many tokens.
        aux_loss: load-balancing loss, mean over the MoE layers (1 when the load is even).
        z_loss: router z-loss, mean over the MoE layers.
        router_logits, selected_experts, branch_norms: as of `HyperMoEModelOutput`.
    """

    lm_loss: Tensor | None = None
    aux_loss: Tensor | None = None
    z_loss: Tensor | None = None
    router_logits: tuple[Tensor, ...] | None = None
    selected_experts: tuple[Tensor, ...] | None = None
    branch_norms: tuple[Tensor, ...] | None = None
