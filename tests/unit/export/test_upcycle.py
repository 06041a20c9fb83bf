"""In fp32, an upcycled model initially computes the same outputs as the dense Transformers model."""

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


def upcycled(theirs: Any, folder: Path, *arguments: int, **options: Any) -> LazyWeights:
    return open_folder(saved(theirs, folder), Upcycling(*arguments, **options), SMALL_HYPER)


@pytest.mark.parametrize(("experts", "top_k"), [(4, 2), (5, 5), (8, 3), (1, 1)])
@pytest.mark.parametrize("case", DENSE)
def test_an_upcycled_model_gives_the_logits_of_the_dense_model(
    case: str, experts: int, top_k: int, tmp_path: Path
) -> None:
    theirs = their_model(case.partition(" ")[0], **DENSE[case])
    weights = upcycled(theirs, tmp_path, experts, top_k)
    assert largest_difference(weights, theirs) < 1e-4 < 0.01 * float(their_logits(theirs).abs().max())


@pytest.mark.parametrize("experts", [2, 8, 64])
def test_with_top_1_the_logits_differ_by_less_than_a_thousandth(experts: int, tmp_path: Path) -> None:
    theirs = their_model("llama")
    weights = upcycled(theirs, tmp_path, experts, 1)
    assert largest_difference(weights, theirs) < 1e-3 * float(their_logits(theirs).abs().max())


@pytest.mark.parametrize(("experts", "top_k", "granularity"), [(8, 4, 4), (12, 6, 3), (8, 4, 2), (4, 2, 2)])
def test_experts_that_are_slices_of_the_mlp_give_the_logits_of_the_dense_model(
    experts: int, top_k: int, granularity: int, tmp_path: Path
) -> None:
    theirs = their_model("qwen3")
    weights = upcycled(theirs, tmp_path, experts, top_k, granularity=granularity)
    assert weights.config.moe_intermediate_size == 24 // granularity
    assert largest_difference(weights, theirs) < 1e-4


@pytest.mark.parametrize("top_k", [1, 2])
def test_router_std_sets_the_size_of_router_logits_and_changes_the_function_only_for_top_1(
    top_k: int, tmp_path: Path
) -> None:
    theirs = their_model("llama")
    weights = upcycled(theirs, tmp_path, 8, top_k, router_std=0.5)
    assert float(weights.read(ROUTER).std()) == pytest.approx(0.5 / 32**0.5, rel=0.15)
    assert (largest_difference(weights, theirs) < 1e-4) == (top_k == 2)


def selections(weights: LazyWeights) -> Tensor:
    """Return the selected experts of all tokens in all layers, [layers, T, K]."""
    model = HyperMoEForCausalLM(weights.config).eval()
    model.load_state_dict({name: weights.read(name) for name in weights.shapes}, strict=False)
    with torch.no_grad():
        return torch.stack(model(input_ids=ids(), output_router_logits=True).selected_experts)


@pytest.mark.parametrize(("experts", "top_k", "granularity"), [(8, 1, 1), (8, 2, 1), (16, 4, 4)])
def test_the_initial_router_distributes_tokens_over_the_experts(
    experts: int, top_k: int, granularity: int, tmp_path: Path
) -> None:
    selected = selections(upcycled(their_model("llama"), tmp_path, experts, top_k, granularity=granularity))
    assert len(selected.unique()) > experts / 2


def test_a_token_selects_all_slices_of_an_mlp(tmp_path: Path) -> None:
    selected = selections(upcycled(their_model("llama"), tmp_path, 16, 8, granularity=4))
    slices = selected.remainder(4).sort(dim=-1).values
    assert torch.equal(slices, torch.tensor([0, 0, 1, 1, 2, 2, 3, 3]).expand_as(slices))


def test_noise_has_the_requested_size_differs_between_experts_and_is_reproducible(tmp_path: Path) -> None:
    theirs = their_model("llama")
    plain, noisy = upcycled(theirs, tmp_path, 3, 2), upcycled(theirs, tmp_path, 3, 2, noise=0.1, seed=4)
    dense = theirs.requires_grad_(False).model.layers[1].mlp
    for name, dense_weight in (
        (GATE_UP, torch.cat([dense.gate_proj.weight, dense.up_proj.weight])),
        (DOWN, dense.down_proj.weight),
    ):
        for expert in range(3):
            assert torch.equal(plain.read(name)[expert], dense_weight)
        difference = noisy.read(name) - plain.read(name)
        assert float(difference.std() / dense_weight.std()) == pytest.approx(0.1, rel=0.1)
        assert not torch.equal(difference[0], difference[1])
        assert torch.equal(noisy.read(name), noisy.read(name))
    assert not torch.equal(noisy.read(ROUTER), plain.read(ROUTER))
    assert largest_difference(noisy, theirs) > 1e-2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1), r"--experts=0: too small; give at least 1"),
        ((4, 0), r"--top-k=0: too small"),
        ((4, 5), r"--top-k=5: more than --experts=4"),
        ((6, 2, 4), r"--experts=6: is not a multiple of --granularity=4, .*; give a multiple"),
        ((8, 2, 4), r"--top-k=2: is not a multiple of --granularity=4"),
        ((4, 2, 1, -0.5), r"--noise=-0.5: is out of range"),
        ((4, 2, 1, float("nan")), r"--noise=nan: is out of range"),
        ((4, 2, 1, 0.0, 0, 0.0), r"--router-std=0.0: is not a standard deviation; give a number above 0"),
    ],
)
def test_invalid_arguments_are_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Upcycling(*arguments)


def test_a_granularity_that_does_not_divide_the_mlp_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--granularity=5: does not divide intermediate_size=24; give a divisor"):
        upcycled(their_model("llama"), tmp_path, 5, 5, granularity=5)


def test_a_model_with_experts_cannot_be_upcycled(tmp_path: Path) -> None:
    theirs = their_model("mixtral", num_local_experts=2)
    with pytest.raises(UserError, match=r"--upcycle: .* already has experts \(model_type='mixtral'\); remove it"):
        upcycled(theirs, tmp_path, 2, 1)
