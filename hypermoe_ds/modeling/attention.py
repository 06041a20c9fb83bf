"""Rotary position embedding and causal grouped-query attention.

Shape legend: B batch size, S sequence length, D hidden size, h heads, d head dimension.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from .configuration_hypermoe import HyperMoEConfig
from .moe import ResidualLinear


def rotary_tables(positions_BS: Tensor, width: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines of the rotary embedding (RoFormer, arXiv 2104.09864), each [B, S, width].

    The tables are computed in fp32 in every forward pass. If they were stored in buffers, casting the model to bf16
    would round them.
    """
    exponent_d = torch.arange(0, width, 2, device=positions_BS.device, dtype=torch.float32) / width
    angle_BSd = positions_BS.unsqueeze(-1).float() * base**-exponent_d
    angle_BSd = torch.cat([angle_BSd, angle_BSd], dim=-1)
    return angle_BSd.cos().to(dtype), angle_BSd.sin().to(dtype)


def rotate(x_BhSd: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate each pair (x_i, x_{i + d/2}) by the rotary angle of the token's position."""
    cos_BSd, sin_BSd = rotary
    first, second = x_BhSd.chunk(2, dim=-1)
    return x_BhSd * cos_BSd.unsqueeze(1) + torch.cat([-second, first], dim=-1) * sin_BSd.unsqueeze(1)


class Attention(nn.Module):
    """Causal grouped-query attention; `config._attn_implementation` selects the attention function."""

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
        **attention_kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the output y_BSD and, if the attention function provides them, the attention weights [B, h, S, S]."""
        B, S, _ = x_BSD.shape
        heads = (B, S, -1, self.head_dim)
        over_queries, over_keys = ((B, S, -1, width) for width in self.norm_widths)
        q_BShd = self.q_norm(self.q_proj(x_BSD).view(over_queries)).view(heads)
        k_BShd = self.k_norm(self.k_proj(x_BSD).view(over_keys)).view(heads)
        q_BhSd, k_BhSd = rotate(q_BShd.transpose(1, 2), rotary), rotate(k_BShd.transpose(1, 2), rotary)
        v_BhSd = self.v_proj(x_BSD).view(heads).transpose(1, 2)
        if past_key_values is not None:
            k_BhSd, v_BhSd = past_key_values.update(k_BhSd, v_BhSd, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        scaling = self.head_dim**-0.5
        y_BShd, weights_BhSS = attend(
            self, q_BhSd, k_BhSd, v_BhSd, attention_mask, scaling=scaling, dropout=0.0, **attention_kwargs
        )
        return self.o_proj(y_BShd.reshape(B, S, -1)), weights_BhSS
