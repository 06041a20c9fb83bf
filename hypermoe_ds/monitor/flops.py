"""Compute the model FLOPs of training, and look up the peak FLOP/s of GPUs."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from hypermoe_ds.modeling import HyperMoEConfig

_BACKWARD_AND_FORWARD = 3  # the backward pass takes twice the FLOPs of the forward pass

# Dense peak TFLOP/s in bf16 or fp16, and in fp32 without TF32, from the vendors' data sheets. If a device name contains
# several keys, the longest one applies.
_PEAK_TFLOPS: Mapping[str, tuple[float, float]] = MappingProxyType(
    {
        "V100": (125, 15.7),
        "A100": (312, 19.5),
        "A10": (125, 31.2),
        "A40": (149.7, 37.4),
        "L4": (121, 30.3),
        "L40S": (362, 91.6),
        "RTX 3090": (71, 35.6),
        "RTX 4090": (165.2, 82.6),
        "H100": (989.4, 66.9),
        "H100 PCIe": (756, 51.2),
        "H100 NVL": (835, 60),
        "H200": (989.4, 66.9),
        "H200 NVL": (836, 60),
        "B200": (2250, 75),
        "MI250X": (191.5, 23.9),  # for one of its two devices
        "MI300X": (1307.4, 163.4),
    }
)


@dataclass(frozen=True)
class ModelFlops:
    """Convert tokens per second to FLOP/s and to a share of the peak.

    Attributes:
        per_token: function that maps the index of a training sample to the FLOPs of training on one of its tokens.
        ranks: number of GPUs or, without GPUs, of processes.
        device: name of the GPU; None without a GPU.
        peak: peak of the device in TFLOP/s; None if unknown.
    """

    per_token: Callable[[int], int]
    ranks: int
    device: str | None
    peak: float | None

    def rates(self, tokens_per_second: float, sample: int) -> dict[str, float]:
        """Return `tokens_per_second_per_gpu`, `tflops_per_gpu` (given a GPU or a peak) and `mfu` (given a peak).

        Args:
            tokens_per_second: tokens per second of all ranks.
            sample: index of a sample of the step, which determines the sequence length.
        """
        tokens = tokens_per_second / self.ranks
        tflops = tokens * self.per_token(sample) / 1e12
        rates = {"tokens_per_second_per_gpu": tokens}
        if self.device is not None or self.peak is not None:
            rates["tflops_per_gpu"] = tflops
        if self.peak is not None:
            rates["mfu"] = tflops / self.peak
        return rates


def training_flops_per_token(model_config: HyperMoEConfig, sequence_length: int) -> int:
    """Return the FLOPs of one token's forward and backward pass.

    The result is three times `HyperMoEConfig.forward_flops_per_token` (PaLM, arXiv 2204.02311, appendix B), so only
    active parameters count. Recomputation is not counted. The generation of HyperExperts is not counted either, because
    all tokens with the same selection share it.
    """
    return _BACKWARD_AND_FORWARD * model_config.forward_flops_per_token(sequence_length)


def peak_tflops(device: str, precision: str) -> float | None:
    """Return the dense peak of a GPU in TFLOP/s; None if the GPU is not in the table.

    Args:
        device: the name that `torch.cuda.get_device_name` returns.
        precision: "bf16", "fp16" or "fp32".
    """
    names = sorted((name for name in _PEAK_TFLOPS if re.search(rf"\b{name}\b", device)), key=len)
    if not names:
        return None
    half, single = _PEAK_TFLOPS[names[-1]]
    return single if precision == "fp32" else half
