"""Checksums of parameters."""

import pytest
import torch

from hypermoe_ds.resilience import replicas
from hypermoe_ds.resilience.replicas import checksum


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_flipped_bit_and_any_exchange_changes_the_checksum(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicas, "_CHUNK", 7)
    parameter = torch.randn(5, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    usual = checksum(parameter).tolist()
    assert checksum(parameter.clone()).tolist() == usual
    words = parameter.view(torch.uint8).view(-1)
    for place in range(words.numel()):
        for bit in range(8):
            words[place] ^= 1 << bit
            assert checksum(parameter).tolist() != usual
            words[place] ^= 1 << bit
    parameter[0, 0], parameter[4, 5] = parameter[4, 5].clone(), parameter[0, 0].clone()
    assert checksum(parameter).tolist() != usual


def test_a_checksum_does_not_depend_on_the_order_in_memory() -> None:
    parameter = torch.arange(12.0).view(3, 4)
    assert torch.equal(checksum(parameter.t().contiguous().t()), checksum(parameter))
