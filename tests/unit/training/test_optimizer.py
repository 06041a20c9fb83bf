"""Parameter groups by name, learning rates against their closed formulas."""

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
def test_norms_biases_and_expert_and_layer_embeddings_alone_do_not_decay(tied: bool) -> None:
    model = HyperMoEForCausalLM(
        HyperMoEConfig(
            vocab_size=16, hidden_size=8, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
            intermediate_size=8, moe_intermediate_size=4, num_experts=4, first_dense_layers=1, qk_norm=True,
            shared_expert_size=4, expert_embedding_size=2, selection_hidden_size=3, hypernetwork_input_size=2,
            bottleneck_size=2, adapter_size=2, tie_word_embeddings=tied,
        )
    )  # fmt: skip
    names = {parameter: name for name, parameter in model.named_parameters()}
    decay, free = parameter_groups(model, 0.3)
    assert (decay["weight_decay"], free["weight_decay"]) == (0.3, 0.0)
    assert {names[p] for p in free["params"]} == {name for name in names.values() if NO_DECAY.fullmatch(name)}
    assert len(free["params"]) == 1 + 3 * 4 + 2 * 3 + 1 + 5
    both = [*decay["params"], *free["params"]]
    assert len(both) == len(set(both)) == len(names)
    assert set(both) == set(model.parameters())


def test_the_bias_heads_of_the_hypernetwork_are_weight_matrices() -> None:
    head = nn.ModuleDict({"up_bias": nn.Linear(2, 3)})
    decay, free = parameter_groups(head, 0.1)
    assert (len(decay["params"]), len(free["params"])) == (1, 1)


STEPS, WARMUP, DECAY, FLOOR = 20, 4, 6, 0.1


def warmed(after: Callable[[int], float], start: float = 0.0) -> Callable[[int], float]:
    return lambda step: start + (1 - start) * step / WARMUP if step < WARMUP else after(step)


def cosine(step: int) -> float:
    progress = (step - WARMUP) / (STEPS - WARMUP)
    return FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * progress)) / 2


def stable_then_decay(step: int) -> float:
    if step < STEPS - DECAY:
        return 1.0
    progress = (step - (STEPS - DECAY)) / DECAY
    return FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * progress)) / 2


FORMULAS = {
    "cosine": warmed(cosine),
    "warmup_stable_decay": warmed(stable_then_decay, start=FLOOR),  # Transformers warms up from the last rate
    "linear": warmed(lambda step: (STEPS - step) / (STEPS - WARMUP)),
    "constant": warmed(lambda _step: 1.0),
}


def rates(schedule: ScheduleConfig) -> list[float]:
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.5)
    scheduler = build_schedule(optimizer, schedule, STEPS)
    taken = []
    for _ in range(STEPS + 1):
        taken.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return taken


@pytest.mark.parametrize("name", FORMULAS)
def test_the_rate_follows_its_formula(name: str) -> None:
    ratio = FLOOR if name in ("cosine", "warmup_stable_decay") else 0.0
    schedule = ScheduleConfig(name=name, warmup_steps=WARMUP, decay_steps=DECAY, min_lr_ratio=ratio)
    expected = [0.5 * FORMULAS[name](step) for step in range(STEPS + 1)]
    assert rates(schedule) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_without_warm_up_the_first_rate_is_the_largest() -> None:
    assert rates(ScheduleConfig(name="cosine"))[0] == 0.5
    assert rates(ScheduleConfig(name="cosine"))[-1] == pytest.approx(0, abs=1e-12)
