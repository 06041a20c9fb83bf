"""Compute attention within masked documents, with one call per document.

On a CPU, separate calls are faster than one call with a mask of S x S values per sample.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

PER_DOCUMENT = "sdpa_per_document"


def attend_per_document(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend to the earlier tokens of the same document, with scaled dot-product attention.

    Args:
        module: the attention module.
        query: [B, heads, S, head_dim].
        key: [B, key-value heads, S, head_dim].
        value: of the same shape as `key`.
        attention_mask: always None, because the positions show where documents begin.
        position_ids: [B, S]; a document begins at each 0. With other shapes, all tokens belong to one document.
        kwargs: further arguments of the attention function.

    Returns:
        The output [B, S, heads, head_dim], and None in place of the attention weights.
    """
    rows, _, length, _ = query.shape
    if position_ids is None or position_ids.shape != (rows, length) or key.shape[2] != length:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)  # type: ignore[no-any-return]
    starts = [*(position_ids == 0).flatten().nonzero().flatten().tolist(), rows * length]
    documents = [end - start for start, end in pairwise(starts)]
    parts = [torch.split(tensor.transpose(0, 1).flatten(1, 2), documents, 1) for tensor in (query, key, value)]
    outputs = [
        sdpa_attention_forward(module, *(part.unsqueeze(0) for part in document), attention_mask, **kwargs)[0]
        for document in zip(*parts, strict=True)
    ]
    return torch.cat(outputs, 1).view(rows, length, *outputs[0].shape[2:]), None


def _no_mask(*_args: Any, **_kwargs: Any) -> None:
    """Return None instead of a mask."""


AttentionInterface.register(PER_DOCUMENT, attend_per_document)
AttentionMaskInterface.register(PER_DOCUMENT, _no_mask)
