"""An upcycled model starts as the dense one: against Transformers' own classes, in fp32."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hypermoe_ds.errors import UserError
from hypermoe_ds.export.from_hf import open_folder
from hypermoe_ds.export.upcycle import Upcycling
from hypermoe_ds.export.weight_loader import LazyWeights
from hypermoe_ds.modeling import HyperMoEForCausalLM
from tests.unit.export.folders import SMALL_HYPER, ids, largest_difference, saved, their_logits, their_model

DENSE: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama tied": {"tie_word_embeddings": True, "num_key_value_heads": 1, "rms_norm_eps": 1e-3},
    "llama wide heads": {"head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 777.0}},
    "mistral": {"sliding_window": None},
    "mistral in its window": {"sliding_window": 64},
    "qwen3": {"head_dim": 16},
}
GATE_UP, DOWN, ROUTER = (
    f"model.layers.1.mlp.{name}" for name in ("experts.gate_up_proj", "experts.down_proj", "router.gate.weight")
)


def upcycled(theirs: Any, folder: Path, *numbers: int, **options: Any) -> LazyWeights:
    return open_folder(saved(theirs, folder), Upcycling(*numbers, **options), SMALL_HYPER)


@pytest.mark.parametrize(("experts", "top_k"), [(4, 2), (5, 5), (8, 3), (1, 1)])
@pytest.mark.parametrize("case", DENSE)
def test_experts_whose_gates_sum_to_one_give_the_dense_models_logits(
    case: str, experts: int, top_k: int, tmp_path: Path
) -> None:
    theirs = their_model(case.partition(" ")[0], **DENSE[case])
    weights = upcycled(theirs, tmp_path, experts, top_k)
    assert largest_difference(weights, theirs) < 1e-4 < 0.01 * float(their_logits(theirs).abs().max())


@pytest.mark.parametrize("experts", [2, 8, 64])
def test_with_one_expert_a_token_the_logits_are_the_dense_models_to_a_thousandth(experts: int, tmp_path: Path) -> None:
    theirs = their_model("llama")
    weights = upcycled(theirs, tmp_path, experts, 1)
    assert largest_difference(weights, theirs) < 1e-3 * float(their_logits(theirs).abs().max())


@pytest.mark.parametrize(("experts", "top_k", "granularity"), [(8, 4, 4), (12, 6, 3), (8, 4, 2), (4, 2, 2)])
def test_slices_of_the_dense_mlp_give_its_logits(experts: int, top_k: int, granularity: int, tmp_path: Path) -> None:
    theirs = their_model("qwen3")
    weights = upcycled(theirs, tmp_path, experts, top_k, granularity=granularity)
    assert weights.config.moe_intermediate_size == 24 // granularity
    assert largest_difference(weights, theirs) < 1e-4


@pytest.mark.parametrize("top_k", [1, 2])
def test_a_larger_router_gives_logits_of_the_size_asked_for_and_for_one_expert_another_function(
    top_k: int, tmp_path: Path
) -> None:
    theirs = their_model("llama")
    weights = upcycled(theirs, tmp_path, 8, top_k, router_std=0.5)
    assert float(weights.read(ROUTER).std()) == pytest.approx(0.5 / 32**0.5, rel=0.15)
    assert (largest_difference(weights, theirs) < 1e-4) == (top_k == 2)


def selections(weights: LazyWeights) -> Tensor:
    """Experts of every token in every layer, [layers, T, K]."""
    model = HyperMoEForCausalLM(weights.config).eval()
    model.load_state_dict({name: weights.read(name) for name in weights.shapes}, strict=False)
    with torch.no_grad():
        return torch.stack(model(input_ids=ids(), output_router_logits=True).selected_experts)


@pytest.mark.parametrize(("experts", "top_k", "granularity"), [(8, 1, 1), (8, 2, 1), (16, 4, 4)])
def test_tokens_are_spread_over_the_experts_from_the_start(
    experts: int, top_k: int, granularity: int, tmp_path: Path
) -> None:
    chosen = selections(upcycled(their_model("llama"), tmp_path, experts, top_k, granularity=granularity))
    assert len(chosen.unique()) > experts / 2


def test_a_token_takes_the_slices_of_a_whole_mlp(tmp_path: Path) -> None:
    chosen = selections(upcycled(their_model("llama"), tmp_path, 16, 8, granularity=4))
    slices = chosen.remainder(4).sort(dim=-1).values
    assert torch.equal(slices, torch.tensor([0, 0, 1, 1, 2, 2, 3, 3]).expand_as(slices))


def test_noise_makes_the_experts_different_by_so_much_and_the_same_each_time(tmp_path: Path) -> None:
    theirs = their_model("llama")
    plain, noisy = upcycled(theirs, tmp_path, 3, 2), upcycled(theirs, tmp_path, 3, 2, noise=0.1, seed=4)
    dense = theirs.requires_grad_(False).model.layers[1].mlp
    for name, of_dense in (
        (GATE_UP, torch.cat([dense.gate_proj.weight, dense.up_proj.weight])),
        (DOWN, dense.down_proj.weight),
    ):
        for expert in range(3):
            assert torch.equal(plain.read(name)[expert], of_dense)
        difference = noisy.read(name) - plain.read(name)
        assert float(difference.std() / of_dense.std()) == pytest.approx(0.1, rel=0.1)
        assert not torch.equal(difference[0], difference[1])
        assert torch.equal(noisy.read(name), noisy.read(name))
    assert not torch.equal(noisy.read(ROUTER), plain.read(ROUTER))
    assert largest_difference(noisy, theirs) > 1e-2


@pytest.mark.parametrize(
    ("numbers", "says"),
    [
        ((0, 1), r"--experts=0: too small; give at least 1"),
        ((4, 0), r"--top-k=0: too small"),
        ((4, 5), r"--top-k=5: more than --experts=4"),
        ((6, 2, 4), r"--experts=6: is not a multiple of --granularity=4, .*; give a multiple"),
        ((8, 2, 4), r"--top-k=2: is not a multiple of --granularity=4"),
        ((4, 2, 1, -0.5), r"--noise=-0.5: is not a number of standard deviations"),
        ((4, 2, 1, float("nan")), r"--noise=nan: is not a number of standard deviations"),
        ((4, 2, 1, 0.0, 0, 0.0), r"--router-std=0.0: is not a standard deviation; give more than 0"),
    ],
)
def test_numbers_that_do_not_fit_each_other_are_refused(numbers: tuple[Any, ...], says: str) -> None:
    with pytest.raises(UserError, match=says):
        Upcycling(*numbers)


def test_slices_that_do_not_divide_the_mlp_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--granularity=5: does not divide intermediate_size=24; give a divisor"):
        upcycled(their_model("llama"), tmp_path, 5, 5, granularity=5)


def test_what_has_experts_already_is_not_upcycled(tmp_path: Path) -> None:
    theirs = their_model("mixtral", num_local_experts=2)
    with pytest.raises(UserError, match=r"--upcycle: .* has experts already \(model_type='mixtral'\); remove it"):
        upcycled(theirs, tmp_path, 2, 1)
