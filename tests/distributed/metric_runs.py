"""Code that ranks run in the tests of metrics: measure norms with hypermoe_ds and with a naive computation."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from engine_runs import engine_of
from small_runs import EPSILON, LEARNING_RATE, SEED, SMALL, WEIGHT_DECAY, Layout, batches_of_rank, training_tokens
from torch import Tensor

from hypermoe_ds.checkpoint.engine_state import EngineState
from hypermoe_ds.modeling import HyperMoEConfig, HyperMoEForCausalLM
from hypermoe_ds.modeling.hyper_experts import HyperExpertWeights
from hypermoe_ds.monitor.similarity import hyper_expert_similarity
from hypermoe_ds.training.evaluation import without_hyper_experts
from hypermoe_ds.training.loop import optimizer_step
from hypermoe_ds.training.norms import ParameterNorms
from hypermoe_ds.training.settings import OptimizerConfig
from hypermoe_ds.training.step_observer import StepObserver
from hypermoe_ds.training.validation import continue_greedily

OPTIMIZER = OptimizerConfig(lr=LEARNING_RATE, eps=EPSILON, weight_decay=WEIGHT_DECAY)
PATTERNS = {
    "experts": r"\.mlp\.experts\.",
    "routers": r"\.mlp\.router\.",
    "hypernetwork": r"\.hypernetwork\.|\.hyper_experts\.",
}


def named_group(name: str) -> str:
    """Return the group of a parameter, using patterns that are independent of those in hypermoe_ds."""
    [*found] = [group for group, pattern in PATTERNS.items() if re.search(pattern, name)]
    assert len(found) <= 1, name
    return found[0] if found else "rest"


class Norms(StepObserver):
    """Observer that measures the gradients of each step."""

    def __init__(self, engine: Any) -> None:
        self.norms = ParameterNorms(engine, OPTIMIZER)

    def observe_gradients(self) -> None:
        self.norms.add_gradients()


class MeasuredStep(NamedTuple):
    """Norms of a step, measured by hypermoe_ds and computed from the weight differences.

    Attributes:
        global_norm: gradient norm that DeepSpeed reports.
        gradients, weights: norms that hypermoe_ds measures.
        expected: naively computed parameter norms and update ratios.
    """

    global_norm: float
    gradients: dict[str, float]
    weights: dict[str, float]
    expected: dict[str, float]


def weights_of(engine: Any) -> dict[str, Tensor]:
    """Copy this rank's part of the fp32 weights."""
    parts = EngineState(engine).tensors()
    return {key.removeprefix("weight/"): part.clone() for key, part in parts if key.startswith("weight/")}


def summed_squares(parts: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the sums of squares by group, over all ranks."""
    sums = dict.fromkeys(("experts", "hypernetwork", "routers", "rest"), 0.0)
    for name, part in parts.items():
        sums[named_group(name)] += float(part.double().square().sum())
    total = torch.tensor(list(sums.values()), dtype=torch.float64)
    torch.distributed.all_reduce(total)
    return dict(zip(sums, total.tolist(), strict=True))


def measure_each(layouts: list[Layout]) -> list[list[MeasuredStep]]:
    """Measure three steps under each layout."""
    return [_measure(layout) for layout in layouts]


def _measure(layout: Layout) -> list[MeasuredStep]:
    engine = engine_of(layout)
    observer, batches = Norms(engine), batches_of_rank(layout, torch.distributed.get_rank())
    steps = []
    for _ in range(3):
        before, lr = weights_of(engine), engine.get_lr()[0]
        optimizer_step(engine, batches, observer)
        after = weights_of(engine)
        weights = summed_squares(after)
        updates = summed_squares({name: after[name] - before[name] for name in after})
        expected = {f"parameter_norm/{group}": square**0.5 for group, square in weights.items()}
        expected |= {f"update_ratio/{group}": (updates[group] / weights[group]) ** 0.5 for group in weights}
        norm, norms = float(engine.get_global_grad_norm()), observer.norms
        steps.append(MeasuredStep(norm, norms.gradients(), norms.weights_and_updates(lr), expected))
    return steps


def serial_gradient_norms() -> dict[str, float]:
    """Return the gradient norms by group of the first step of the serial run."""
    torch.manual_seed(SEED)
    network = HyperMoEForCausalLM(HyperMoEConfig(**SMALL))
    step = training_tokens()[0]
    labels = step[:, 1:].contiguous()
    network(input_ids=step[:, :-1], shift_labels=labels, use_cache=False).loss.backward()
    squares = dict.fromkeys(("experts", "hypernetwork", "routers", "rest"), 0.0)
    for name, parameter in network.named_parameters():
        if parameter.grad is not None:
            squares[named_group(name)] += float(parameter.grad.double().square().sum())
    return {f"grad_norm/{group}": square**0.5 for group, square in squares.items()}


class ModelResults(NamedTuple):
    """Metrics and outputs of a model on one rank.

    Attributes:
        similarity: similarity of HyperExperts, as measured by hypermoe_ds.
        pairs: mean cosine similarity over all pairs of HyperExperts of a layer, computed naively.
        without: logits without HyperExperts.
        again: logits with HyperExperts, computed before the HyperExperts are disabled and after they are enabled again.
        tokens: greedy continuation of a prompt.
    """

    similarity: dict[str, float]
    pairs: list[float]
    without: Tensor
    again: tuple[Tensor, Tensor]
    tokens: list[int]


PROMPT, NEW_TOKENS = [5, 17, 3, 99], 12


def evaluate_each(layouts: list[Layout]) -> list[ModelResults]:
    """Return the similarity, the logits without HyperExperts and a sample text for each layout."""
    return [_evaluate(layout) for layout in layouts]


@torch.no_grad()
def _evaluate(layout: Layout) -> ModelResults:
    engine = engine_of(layout)
    model, seen = engine.module.model, []
    handle = model.hypernetwork.register_forward_hook(lambda _module, _inputs, weights: seen.append(weights))
    hyper_experts = [layer.hyper_experts for layer in model.layers if layer.is_moe]
    similarity = hyper_expert_similarity(hyper_experts, model.hypernetwork, model.config.num_experts_per_tok)
    handle.remove()
    engine.eval()
    probe = training_tokens()[0, :2, :-1]
    before = engine(input_ids=probe, use_cache=False).logits
    with without_hyper_experts(engine.module):
        without = engine(input_ids=probe, use_cache=False).logits
    after = engine(input_ids=probe, use_cache=False).logits
    tokens = continue_greedily(engine, PROMPT, NEW_TOKENS, engine.device)
    return ModelResults(similarity, [_pairs(weights) for weights in seen], without, (before, after), tokens)


def _pairs(weights: HyperExpertWeights) -> float:
    """Return the mean cosine similarity over all pairs of generated weights, computed in fp64."""
    count = len(weights.up_bias)
    vectors = [
        [*weights.down_weight[u].flatten().tolist(), *weights.up_weight[u].flatten().tolist()] for u in range(count)
    ]
    cosines = []
    for first in range(count):
        for second in range(first):
            x, y = (torch.tensor(vectors[u], dtype=torch.float64) for u in (first, second))
            cosines.append(float(x @ y / (x.norm() * y.norm())))
    return sum(cosines) / len(cosines)
