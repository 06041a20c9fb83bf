"""Test the parameter groups by name and the learning rates against their formulas."""

import math
import re
from collections.abc import Callable

import pytest
import torch
from torch import nn

from hypermoe_ds.modeling import HyperMoEConfig, HyperMoEForCausalLM
from hypermoe_ds.training.optimizer import build_schedule, parameter_groups
from hypermoe_ds.training.settings import ScheduleConfig

NO_DECAY = re.compile(
    r"model\.norm\.weight"
    r"|model\.layers\.\d\.(input_layernorm|post_attention_layernorm)\.weight"
    r"|model\.layers\.\d\.self_attn\.[qk]_norm\.weight"
    r"|model\.layers\.[12]\.hyper_experts\.encoder\.(expert_embedding\.weight|mlp\.[02]\.bias)"
    r"|model\.hypernetwork\.layer_embedding\.weight"
    r"|model\.hypernetwork\.(trunk|down_weight|down_bias|up_weight|up_bias)\.bias"
)


@pytest.mark.parametrize("tied", [False, True])
def test_only_norms_biases_and_expert_and_layer_embeddings_do_not_decay(tied: bool) -> None:
    model = HyperMoEForCausalLM(
        HyperMoEConfig(
            vocab_size=16, hidden_size=8, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
            intermediate_size=8, moe_intermediate_size=4, num_experts=4, first_dense_layers=1, qk_norm=True,
            shared_expert_size=4, expert_embedding_size=2, selection_hidden_size=3, hypernetwork_input_size=2,
            bottleneck_size=2, adapter_size=2, tie_word_embeddings=tied,
        )
    )  # fmt: skip
    names = {parameter: name for name, parameter in model.named_parameters()}
    decay, no_decay = parameter_groups(model, 0.3)
    assert (decay["weight_decay"], no_decay["weight_decay"]) == (0.3, 0.0)
    assert {names[p] for p in no_decay["params"]} == {name for name in names.values() if NO_DECAY.fullmatch(name)}
    assert len(no_decay["params"]) == 1 + 3 * 4 + 2 * 3 + 1 + 5
    both = [*decay["params"], *no_decay["params"]]
    assert len(both) == len(set(both)) == len(names)
    assert set(both) == set(model.parameters())


def test_bias_heads_of_the_hypernetwork_decay_as_weight_matrices() -> None:
    head = nn.ModuleDict({"up_bias": nn.Linear(2, 3)})
    decay, no_decay = parameter_groups(head, 0.1)
    assert (len(decay["params"]), len(no_decay["params"])) == (1, 1)


STEPS, WARMUP, DECAY, FLOOR = 20, 4, 6, 0.1
SHAPES = ("cosine", "warmup_stable_decay", "linear", "constant")


def cosine(progress: float) -> float:
    return FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * progress)) / 2


# After the warm-up, the learning rate of step s = 1 ... 20 is the peak times this factor.
FORMULAS: dict[str, Callable[[int], float]] = {
    "cosine": lambda s: cosine((s - WARMUP) / (STEPS - WARMUP)),
    "warmup_stable_decay": lambda s: 1.0 if s <= STEPS - DECAY else cosine((s - STEPS + DECAY) / DECAY),
    "linear": lambda s: 1 - (1 - FLOOR) * (s - WARMUP) / (STEPS - WARMUP),
    "constant": lambda _: 1.0,
}


def rates(schedule: ScheduleConfig, steps: int = STEPS) -> list[float]:
    """Return the learning rate of each optimizer step; the peak is 0.5."""
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.5)
    scheduler = build_schedule(optimizer, schedule, steps)
    rates_of_steps = []
    for _ in range(steps):
        rates_of_steps.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates_of_steps


@pytest.mark.parametrize("name", SHAPES)
def test_learning_rate_of_each_step_follows_the_formula(name: str) -> None:
    schedule = ScheduleConfig(name=name, warmup_steps=WARMUP, decay_steps=DECAY, min_lr_ratio=FLOOR)
    expected = [0.5 * (s / WARMUP if s < WARMUP else FORMULAS[name](s)) for s in range(1, STEPS + 1)]
    assert rates(schedule) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("warmup", [0, 1, 4, 14])
def test_learning_rate_starts_peaks_and_ends_as_configured(name: str, warmup: int) -> None:
    schedule = ScheduleConfig(name=name, warmup_steps=warmup, decay_steps=DECAY, min_lr_ratio=FLOOR)
    lrs = rates(schedule)
    assert lrs[0] == 0.5 / max(warmup, 1)
    assert lrs[max(warmup, 1) - 1] == 0.5
    assert lrs[-1] == (0.5 if name == "constant" else 0.5 * FLOOR)
    stable = 0 if name in ("cosine", "linear") else STEPS - DECAY - max(warmup, 1)
    assert lrs.count(0.5) == 1 + stable + (DECAY if name == "constant" else 0)


@pytest.mark.parametrize(("decay", "last"), [(1, [1, 1, 0.1]), (2, [1, 0.55, 0.1]), (20, [0.1])])
def test_warmup_stable_decay_ends_at_the_minimum_rate(decay: int, last: list[float]) -> None:
    lrs = rates(ScheduleConfig(name="warmup_stable_decay", decay_steps=decay, min_lr_ratio=FLOOR))
    assert lrs[-len(last) :] == pytest.approx([0.5 * factor for factor in last], rel=1e-12)
    assert lrs[0] == 0.5


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_first_learning_rate_of_short_runs_is_above_zero(name: str, steps: int) -> None:
    for warmup in range(steps + 1):
        decay = steps - warmup
        lrs = rates(ScheduleConfig(name=name, warmup_steps=warmup, decay_steps=decay), steps)
        assert lrs[0] == 0.5 / max(warmup, 1)
        assert lrs[-1] == (0 if name != "constant" and max(warmup, 1) < steps else 0.5)
