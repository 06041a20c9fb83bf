import math
import random

from hypermoe_ds.resilience.loss_spikes import SpikeDetector


def noisy(seed: int, steps: int) -> list[float]:
    """Return losses that fall from 10 to 3, with the noise of single batches."""
    generator = random.Random(seed)
    return [3 + 7 * math.exp(-step / 80) + generator.gauss(0, 0.05) for step in range(steps)]


def test_a_steadily_falling_loss_has_no_spikes() -> None:
    for seed in range(10):
        detector = SpikeDetector()
        assert [detector.deviations(loss) for loss in noisy(seed, 600)] == [None] * 600


def test_a_spike_is_measured_in_robust_deviations_and_does_not_hide_the_next() -> None:
    detector = SpikeDetector()
    losses = noisy(0, 600)
    for loss in losses:
        detector.deviations(loss)
    found = [detector.deviations(6.0) for _ in range(20)]
    assert all(value is not None and value > 8 for value in found)
    assert detector.deviations(losses[-1]) is None


def test_the_first_16_losses_and_non_finite_losses_are_not_spikes() -> None:
    detector = SpikeDetector()
    assert [detector.deviations(loss) for loss in [1.0] * 15 + [1e6]] == [None] * 16
    assert [detector.deviations(loss) for loss in (math.nan, math.inf)] == [None, None]
    assert detector.deviations(2.0) is not None
