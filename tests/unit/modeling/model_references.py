"""Reference implementation of HyperMoE, one token at a time.

The reference computes the output of a module from its parameters, in their dtype, with elementary operations. It does
not call the code under test.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from hypermoe_ds.modeling import HyperMoEConfig, HyperMoEForCausalLM
from hypermoe_ds.modeling.hyper_experts import HyperExperts, HyperNetwork, SelectionEncoder
from hypermoe_ds.modeling.moe import MoEBlock

SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "moe_intermediate_size": 24,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "expert_embedding_size": 7,
    "selection_hidden_size": 9,
    "hypernetwork_input_size": 6,
    "layer_embedding_size": 5,
    "bottleneck_size": 11,
    "adapter_size": 8,
}

# Together these configurations reach every branch of the decoder.
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "top-1": {"num_experts_per_tok": 1, "norm_topk_prob": True},
    "renormalised, qk-norm": {"norm_topk_prob": True, "qk_norm": True, "num_key_value_heads": 4},
    "dense and shared": {
        "num_hidden_layers": 5,
        "first_dense_layers": 1,
        "moe_every": 2,
        "shared_expert_size": 12,
        "num_key_value_heads": 1,
    },
    "untied, wide heads": {"tie_word_embeddings": False, "head_dim": 10},
    "normalised over all heads": {"qk_norm": True, "qk_norm_scope": "all_heads", "head_dim": 10},
    "no hypernetwork": {"hypernetwork": False},
    "all experts": {"num_experts_per_tok": 4},
}
# These variants still reach every code path of attention, MoE blocks and HyperExperts.
PATHS = [
    "plain",
    "top-1",
    "renormalised, qk-norm",
    "dense and shared",
    "untied, wide heads",
    "normalised over all heads",
    "no hypernetwork",
]


def tokens(*shape: int) -> Tensor:
    """Return random token ids."""
    return torch.randint(0, SMALL["vocab_size"], shape)


def build(seed: int = 0, **overrides: Any) -> HyperMoEForCausalLM:
    """Build a small model whose weights, including generated ones, are of order one, so that all affect the output."""
    torch.manual_seed(seed)
    model = HyperMoEForCausalLM(HyperMoEConfig(**{**SMALL, "initializer_range": 0.2, **overrides}))
    if model.model.hypernetwork is not None:
        scale_up_generated_weights(model.model.hypernetwork)
    return model.eval()


@torch.no_grad()
def scale_up_generated_weights(hypernetwork: HyperNetwork) -> None:
    """Scale weights: outputs and biases of HyperExperts become of order one, and about half of the ReLUs are active."""
    heads = (hypernetwork.down_weight, hypernetwork.down_bias, hypernetwork.up_weight, hypernetwork.up_bias)
    for head in heads:
        head.weight.mul_(1000)
        head.bias.normal_(std=0.5 * head.weight.abs().max().item())
    hypernetwork.down_bias.bias.add_(0.3)
    hypernetwork.trunk.bias.add_(0.3)


def distance(value: Tensor, reference: Tensor) -> float:
    """Return |value - reference| / |reference|, or |value| if the reference is zero."""
    value, reference = value.detach().double(), reference.detach().double()
    norm = reference.norm().item()
    return (value - reference).norm().item() / norm if norm else value.norm().item()


def random_selection(tokens: int, num_experts: int, top_k: int) -> Tensor:
    return torch.rand(tokens, num_experts).argsort(dim=1)[:, :top_k]


def hyper_experts(
    x_TD: Tensor, selected_TK: Tensor, encoder: SelectionEncoder, hypernetwork: HyperNetwork, layer_index: int
) -> Tensor:
    """Compute HyperExpert(x) token by token (steps 2 to 6 of docs/METHOD.md), with a loop over unselected experts."""
    D, A = hypernetwork.hidden_size, hypernetwork.adapter_size
    first, _, second = encoder.mlp
    rows = []
    for x_D, selected in zip(x_TD, selected_TK.tolist(), strict=True):
        s_E = torch.zeros_like(encoder.expert_embedding.weight[0])
        for expert, embedding_E in enumerate(encoder.expert_embedding.weight):
            if expert not in selected:
                s_E = s_E + embedding_E
        z_H = second.weight @ torch.clamp(first.weight @ s_E + first.bias, min=0) + second.bias
        joined = torch.cat([z_H, hypernetwork.layer_embedding.weight[layer_index]])
        u_B = torch.clamp(hypernetwork.trunk.weight @ joined + hypernetwork.trunk.bias, min=0)

        def generate(head: nn.Linear, u_B: Tensor = u_B) -> Tensor:
            return head.weight @ u_B + head.bias

        inner_A = x_D @ generate(hypernetwork.down_weight).reshape(D, A) + generate(hypernetwork.down_bias)
        inner_A = torch.clamp(inner_A, min=0)
        rows.append(inner_A @ generate(hypernetwork.up_weight).reshape(A, D) + generate(hypernetwork.up_bias))
    return torch.stack(rows)


def swiglu(x_D: Tensor, gate_FD: Tensor, up_FD: Tensor, down_DF: Tensor) -> Tensor:
    gate_F = gate_FD @ x_D
    return down_DF @ (gate_F / (1 + torch.exp(-gate_F)) * (up_FD @ x_D))


def route(x_D: Tensor, gate_ND: Tensor, top_k: int, renormalise: bool) -> tuple[list[int], list[Tensor]]:
    """Return the K most probable experts of one token and their gates."""
    score_N = torch.exp(gate_ND @ x_D)
    probability_N = score_N / score_N.sum()
    selected = sorted(range(len(probability_N)), key=lambda expert: -probability_N[expert].item())[:top_k]
    gates = [probability_N[expert] for expert in selected]
    if renormalise and top_k > 1:
        total = sum(gates)
        gates = [gate / total for gate in gates]
    return selected, gates


def moe_block(block: MoEBlock, x_TD: Tensor, top_k: int, renormalise: bool) -> tuple[Tensor, Tensor]:
    """Compute the MoE block token by token. Also return the selected experts [T, K]."""
    rows, selections = [], []
    experts, shared = block.experts, block.shared_experts
    for x_D in x_TD:
        selected, gates = route(x_D, block.router.gate.weight, top_k, renormalise)
        y_D = torch.zeros_like(x_D)
        for expert, gate in zip(selected, gates, strict=True):
            half = experts.gate_up_proj.shape[1] // 2
            gate_FD, up_FD = experts.gate_up_proj[expert, :half], experts.gate_up_proj[expert, half:]
            y_D = y_D + gate * swiglu(x_D, gate_FD, up_FD, experts.down_proj[expert])
        if shared is not None:
            y_D = y_D + swiglu(x_D, shared.gate_proj.weight, shared.up_proj.weight, shared.down_proj.weight)
        rows.append(y_D)
        selections.append(selected)
    return torch.stack(rows), torch.tensor(selections)


def rotate_as_complex(x_d: Tensor, position: int, base: float) -> Tensor:
    """Rotate one vector as in RoFormer: multiply the complex pair (k, k + d/2) by exp(i * position * base^(-2k/d))."""
    half = x_d.shape[0] // 2
    exponent = torch.arange(half, dtype=torch.float64) * 2 / x_d.shape[0]
    rotation = torch.polar(torch.ones(half, dtype=torch.float64), position * base**-exponent)
    rotated = torch.complex(x_d[:half].double(), x_d[half:].double()) * rotation
    return torch.cat([rotated.real, rotated.imag]).to(x_d.dtype)


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    return x_TD / torch.sqrt((x_TD * x_TD).mean(-1, keepdim=True) + eps) * weight_D


def attention(model: HyperMoEForCausalLM, layer: int, x_SD: Tensor) -> Tensor:
    """Compute causal attention for one sequence, one query and head at a time."""
    config, attn = model.config, model.model.layers[layer].self_attn
    d, group = config.head_dim, config.num_attention_heads // config.num_key_value_heads
    queries, keys, values = (x_SD @ linear.weight.T for linear in (attn.q_proj, attn.k_proj, attn.v_proj))
    if config.qk_norm and config.qk_norm_scope == "all_heads":
        queries = rms_norm(queries, attn.q_norm.weight, config.rms_norm_eps)
        keys = rms_norm(keys, attn.k_norm.weight, config.rms_norm_eps)
    queries, keys, values = (x_SH.unflatten(-1, (-1, d)) for x_SH in (queries, keys, values))
    if config.qk_norm and config.qk_norm_scope == "head":
        queries = rms_norm(queries, attn.q_norm.weight, config.rms_norm_eps)
        keys = rms_norm(keys, attn.k_norm.weight, config.rms_norm_eps)
    rows = []
    for i in range(x_SD.shape[0]):
        heads = []
        for head in range(config.num_attention_heads):
            q_d = rotate_as_complex(queries[i, head], i, config.rope_theta)
            rotated = [rotate_as_complex(keys[j, head // group], j, config.rope_theta) for j in range(i + 1)]
            weights = torch.softmax(torch.stack([k_d @ q_d for k_d in rotated]) / math.sqrt(d), dim=0)
            heads.append(weights @ values[: i + 1, head // group])
        rows.append(attn.o_proj.weight @ torch.cat(heads))
    return torch.stack(rows)


def logits(model: HyperMoEForCausalLM, ids_S: Tensor) -> Tensor:
    """Compute the logits of one sequence."""
    config, decoder = model.config, model.model
    x_SD = decoder.embed_tokens.weight[ids_S]
    for index, layer in enumerate(decoder.layers):
        x_SD = x_SD + attention(model, index, rms_norm(x_SD, layer.input_layernorm.weight, config.rms_norm_eps))
        hidden_SD = rms_norm(x_SD, layer.post_attention_layernorm.weight, config.rms_norm_eps)
        sparse = index >= config.first_dense_layers and (index - config.first_dense_layers + 1) % config.moe_every == 0
        if not sparse:
            mlp = layer.mlp
            weights = (mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight)
            x_SD = x_SD + torch.stack([swiglu(x_D, *weights) for x_D in hidden_SD])
            continue
        y_SD, selected = moe_block(layer.mlp, hidden_SD, config.num_experts_per_tok, config.norm_topk_prob)
        if config.hypernetwork:
            layer_hyper_experts: HyperExperts = layer.hyper_experts
            earlier = range(config.first_dense_layers, index)
            layer_index = sum((i - config.first_dense_layers + 1) % config.moe_every == 0 for i in earlier)
            y_SD = y_SD + hyper_experts(
                hidden_SD, selected, layer_hyper_experts.encoder, decoder.hypernetwork, layer_index
            )
        x_SD = x_SD + y_SD
    output = decoder.embed_tokens if config.tie_word_embeddings else model.lm_head
    return rms_norm(x_SD, decoder.norm.weight, config.rms_norm_eps) @ output.weight.T


def switch_loss(logits_TN: Tensor, selected_TK: Tensor) -> Tensor:
    """Return N * sum_i f_i P_i (Switch Transformers, equation 4), with f_i from counting tokens."""
    tokens, N = logits_TN.shape
    chosen = [expert for row in selected_TK.tolist() for expert in row]
    loss = torch.zeros((), dtype=logits_TN.dtype)
    for expert in range(N):
        share = chosen.count(expert) / len(chosen)
        probability = sum(torch.exp(row[expert]) / torch.exp(row).sum() for row in logits_TN) / tokens
        loss = loss + N * share * probability
    return loss


def z_loss(logits_TN: Tensor) -> Tensor:
    """Return the mean over tokens of (log sum_j exp(logit_j))^2 (ST-MoE, equation 5)."""
    return sum(torch.log(torch.exp(row).sum()) ** 2 for row in logits_TN) / logits_TN.shape[0]
