"""Test model FLOPs and MFU against a count by hand."""

import pytest

from hypermoe_ds.modeling import HyperMoEConfig
from hypermoe_ds.monitor.flops import ModelFlops, peak_tflops, training_flops_per_token


def test_flops_and_mfu_match_a_count_by_hand() -> None:
    config = HyperMoEConfig(
        vocab_size=1000, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        moe_intermediate_size=32, num_experts=8, num_experts_per_tok=2, shared_expert_size=0, adapter_size=4,
    )  # fmt: skip
    attention = 2 * (64 * 64 + 64 * 32 + 64 * 32 + 64 * 64) + 2 * 2 * 128 * 64  # q, k, v, o; scores and values
    experts = 2 * (64 * 8) + 2 * (2 * 3 * 64 * 32)  # router; two SwiGLUs of three matrices
    hyper_expert = 2 * (64 * 4 + 4 * 64)
    forward = 2 * (attention + experts + hyper_expert) + 2 * 64 * 1000
    assert training_flops_per_token(config, sequence_length=128) == 3 * forward
    # 4 GPUs, 8,000,000 tokens/s together, 10 TFLOP/s peak each
    rates = ModelFlops(lambda sample: sample * forward, 4, "some GPU", 10.0).rates(8e6, sample=3)
    tflops = 2e6 * 3 * forward / 1e12
    assert rates == {
        "tokens_per_second_per_gpu": 2e6,
        "tflops_per_gpu": pytest.approx(tflops),
        "mfu": pytest.approx(tflops / 10),
    }


def test_cpu_reports_flops_and_mfu_only_with_a_given_peak() -> None:
    assert ModelFlops(lambda _: 1000, 2, None, None).rates(10.0, 0) == {"tokens_per_second_per_gpu": 5.0}
    assert ModelFlops(lambda _: 1000, 2, "unknown", None).rates(10.0, 0).keys() == {
        "tokens_per_second_per_gpu",
        "tflops_per_gpu",
    }
    assert "mfu" in ModelFlops(lambda _: 1000, 2, None, 0.1).rates(10.0, 0)


@pytest.mark.parametrize(
    ("device", "precision", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4),
        ("NVIDIA H100 PCIe", "fp16", 756),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA A100-SXM4-80GB", "fp32", 19.5),
        ("NVIDIA A10", "bf16", 125),
        ("NVIDIA A10G", "bf16", None),
        ("NVIDIA L40S", "bf16", 362),
        ("AMD Instinct MI300X", "bf16", 1307.4),
        ("Radeon", "bf16", None),
    ],
)
def test_peak_is_that_of_the_longest_matching_name(device: str, precision: str, peak: float | None) -> None:
    assert peak_tflops(device, precision) == peak
