import pytest
import torch

from hypermoe_ds.resilience import replicas
from hypermoe_ds.resilience.replicas import checksum


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_flipped_bit_or_two_swapped_values_change_the_checksum(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicas, "_CHUNK", 7)
    parameter = torch.randn(5, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    original = checksum(parameter).tolist()
    assert checksum(parameter.clone()).tolist() == original
    data = parameter.view(torch.uint8).view(-1)
    for offset in range(data.numel()):
        for bit in range(8):
            data[offset] ^= 1 << bit
            assert checksum(parameter).tolist() != original
            data[offset] ^= 1 << bit
    parameter[0, 0], parameter[4, 5] = parameter[4, 5].clone(), parameter[0, 0].clone()
    assert checksum(parameter).tolist() != original


def test_the_checksum_does_not_depend_on_the_memory_layout() -> None:
    parameter = torch.arange(12.0).view(3, 4)
    assert torch.equal(checksum(parameter.t().contiguous().t()), checksum(parameter))
