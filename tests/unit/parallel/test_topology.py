"""Compare layout arithmetic with brute force, and check that every refusal suggests values that work."""

import re
from itertools import product

import pytest
import torch

from hypermoe_ds.config import validate
from hypermoe_ds.errors import UserError
from hypermoe_ds.parallel.topology import (
    ParallelConfig,
    check_expert_parallel,
    check_widths_on_gpu,
    gradient_accumulation_steps,
    hosts_that_fit,
    largest_expert_parallel,
)


@pytest.mark.parametrize(("micro_batch", "ranks"), list(product(range(1, 6), range(1, 7))))
def test_accumulation_steps_divide_the_batch_exactly_or_are_refused_with_valid_sizes(
    micro_batch: int, ranks: int
) -> None:
    for batch in range(1, 61):
        solutions = [steps for steps in range(1, 61) if steps * micro_batch * ranks == batch]
        if solutions:
            assert gradient_accumulation_steps(batch, micro_batch, ranks) == solutions[0]
            continue
        with pytest.raises(UserError) as error:
            gradient_accumulation_steps(batch, micro_batch, ranks)
        text = str(error.value)
        problem = f"multiplied by {ranks} ranks, it does not divide train.global_batch_size={batch}"
        assert text.startswith(f"train.micro_batch_size={micro_batch}: {problem}; ")
        remedy = text.partition("; ")[2]
        valid_sizes = [size for size in range(1, 61) if batch % (size * ranks) == 0]
        if valid_sizes:
            assert remedy == f"with {ranks} ranks, choose one of {', '.join(map(str, valid_sizes))}"
        else:
            assert remedy == f"choose a global batch that is a multiple of {micro_batch * ranks}"


@pytest.mark.parametrize(("experts", "ranks"), list(product((1, 2, 3, 6, 8), (1, 2, 4, 6))))
def test_expert_parallelism_divides_experts_and_ranks_or_is_refused_with_valid_sizes(experts: int, ranks: int) -> None:
    allowed = [size for size in range(1, 13) if experts % size == 0 == ranks % size]
    for size in range(1, 13):
        if size in allowed:
            check_expert_parallel(size, experts, ranks)
            continue
        with pytest.raises(UserError) as error:
            check_expert_parallel(size, experts, ranks)
        setting, _, rest = str(error.value).partition(": ")
        problem, _, remedy = rest.partition("; ")
        assert setting == f"parallel.expert={size}"
        cause = (
            f"does not divide model.num_experts={experts}" if experts % size else f"divide the number of ranks, {ranks}"
        )
        assert cause in problem
        assert [int(number) for number in re.findall(r"\d+", remedy.partition("choose ")[2])] == allowed


@pytest.mark.parametrize("slots", [(1,), (2, 2, 2, 2), (8, 8, 8), (4, 2, 1, 1), (3, 5)])
def test_hosts_that_fit_is_the_largest_number_of_hosts_that_divides_the_batch(slots: tuple[int, ...]) -> None:
    for batch, micro_batch in product(range(1, 49), (1, 2, 3)):
        counts = [n for n in range(1, len(slots) + 1) if batch % (micro_batch * sum(slots[:n])) == 0]
        assert hosts_that_fit(slots, batch, micro_batch) == max(counts, default=0)


def test_largest_expert_parallel_is_the_largest_valid_size_up_to_the_setting() -> None:
    for expert, experts, ranks in product((1, 2, 4, 8, 16), (1, 4, 6, 8, 16), range(1, 17)):
        size = largest_expert_parallel(expert, experts, ranks)
        check_expert_parallel(size, experts, ranks)
        assert size <= expert
        assert not [n for n in range(size + 1, expert + 1) if experts % n == 0 and ranks % n == 0]


@pytest.mark.parametrize("value", [0, -1, 1.5, "2", True])
def test_expert_parallelism_must_be_a_positive_integer(value: object) -> None:
    with pytest.raises(UserError, match=r"recipe\.yaml: expert="):
        validate(ParallelConfig, {"expert": value}, "recipe.yaml")


def multiplies_on_gpu(hidden: int, width: int) -> bool:
    """Return whether the experts' grouped products pass the checks of CUDA, which also run on the meta device."""
    ends = torch.empty(4, device="meta", dtype=torch.int32)

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, device="meta", dtype=torch.bfloat16)

    try:
        gate = torch._grouped_mm(empty(64, hidden), empty(4, width, hidden).transpose(-2, -1), offs=ends)
        torch._grouped_mm(gate, empty(4, hidden, width).transpose(-2, -1), offs=ends)
    except RuntimeError:
        return False
    return True


@pytest.mark.parametrize(("hidden", "width"), [(64, 24), (64, 20), (60, 24), (8, 8), (64, 7), (72, 72), (33, 40)])
def test_widths_that_no_gpu_multiplies_in_bf16_are_refused_with_widths_that_work(hidden: int, width: int) -> None:
    if multiplies_on_gpu(hidden, width):
        check_widths_on_gpu(hidden, width, "bf16")
        return
    with pytest.raises(UserError) as caught:
        check_widths_on_gpu(hidden, width, "bf16")
    key, nearest = re.fullmatch(
        r"model\.(\w+)=\d+: is not a multiple of 8, as the experts need on a GPU in bf16; set it to (.*)",
        str(caught.value),
    ).groups()  # type: ignore[union-attr]
    for size in map(int, nearest.split(" or ")):
        assert multiplies_on_gpu(size, 64) if key == "hidden_size" else multiplies_on_gpu(64, size)


def test_fp32_needs_multiples_of_four() -> None:
    check_widths_on_gpu(36, 20, "fp32")
    with pytest.raises(UserError, match=r"hidden_size=34: is not a multiple of 4.*set it to 32 or 36"):
        check_widths_on_gpu(34, 20, "fp32")
