"""The loss without logits, against `F.cross_entropy` on all of them."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from model_references import build, distance, tokens
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from hypermoe_ds.modeling import lm_head
from hypermoe_ds.modeling.lm_head import LMHead

V, D, T = 101, 16, 37
ROWS = 5  # of a chunk; T is not a multiple of it

Case = tuple[LMHead, Tensor, Tensor]
IGNORED = {"none": slice(0, 0), "some": slice(3, 20), "all but one": slice(1, T), "all": slice(0, T)}


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm_head, "_CHUNK_BYTES", ROWS * V * 4)


def case(ignored: str = "none", dtype: torch.dtype = torch.float32) -> Case:
    head = LMHead(D, V).to(dtype)
    labels = torch.randint(0, V, (T,))
    labels[IGNORED[ignored]] = -100
    return head, torch.randn(T, D).to(dtype).requires_grad_(), labels


def on_all_logits(head: LMHead, x: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, head.weight).float(), labels)


def results(loss: Callable[..., Tensor], head: LMHead, x: Tensor, labels: Tensor, factor: float = 1.0) -> list[Tensor]:
    """Value, and gradients of `factor` times it."""
    value = loss(head, x, labels)
    return [value, *torch.autograd.grad(value * factor, [x, head.weight])]


@pytest.mark.parametrize("factor", [1.0, 0.25, 2.0**16])
@pytest.mark.parametrize("ignored", IGNORED)
def test_value_and_gradients_are_those_on_all_logits(ignored: str, factor: float) -> None:
    one = case(ignored)
    seen, expected = (results(loss, *one, factor) for loss in (LMHead.__call__, on_all_logits))
    assert torch.isnan(expected[0]) == (ignored == "all")
    for mine, theirs in zip(seen, expected, strict=True):
        assert mine.dtype is torch.float32
        largest = theirs.nan_to_num().abs().max().item()
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6 * largest, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_gradients_are_nearly_as_exact_as_those_on_all_logits(dtype: torch.dtype) -> None:
    head, x, labels = case("some", dtype)
    exact_head = LMHead(D, V).double()
    exact_head.weight.data.copy_(head.weight.detach())
    exact_x = x.detach().double().requires_grad_()
    exact = results(lambda h, x, y: F.cross_entropy(h(x), y), exact_head, exact_x, labels)
    seen, usual = (results(loss, head, x, labels) for loss in (LMHead.__call__, on_all_logits))
    assert [value.dtype for value in seen] == [torch.float32, dtype, dtype]
    for mine, theirs, truth in zip(seen, usual, exact, strict=True):
        # Rounded twice, before and after the incoming gradient: sqrt(2) of the error.
        assert distance(mine, truth) < 1.5 * distance(theirs, truth) + 1e-6


def test_gradients_too_small_for_half_precision_arrive_when_the_loss_is_scaled() -> None:
    head, x, labels = case(dtype=torch.float16)
    with torch.no_grad():
        x.mul_(1e-3)
    scale = 2.0**10
    seen = results(LMHead.__call__, head, x, labels, scale)[2]
    wide = LMHead(D, V)
    wide.weight.data.copy_(head.weight)
    expected = results(on_all_logits, wide, x.detach().float().requires_grad_(), labels, scale)[2]
    assert (expected / scale).abs().median() < 2.0**-19, "unscaled it would lose its digits in fp16"
    assert distance(seen, expected) < 5e-3


def test_under_autocast_products_are_in_bfloat16_and_gradients_in_the_parameters_precision() -> None:
    one = case("some")
    with torch.autocast("cpu", torch.bfloat16):
        seen = LMHead.__call__(*one)
        logits = F.linear(one[1], one[0].weight)
    assert logits.dtype is torch.bfloat16
    assert torch.allclose(seen, F.cross_entropy(logits.float(), one[2]), rtol=1e-6)
    gradients = torch.autograd.grad(seen, [one[1], one[0].weight])
    for mine, theirs in zip(gradients, results(on_all_logits, *one)[1:], strict=True):
        assert mine.dtype is torch.float32
        assert distance(mine, theirs) < 2e-2


def test_gradients_add_up_over_calls() -> None:
    head, x, labels = case("some")
    for _ in range(3):
        (head(x, labels) / 3).backward()
    _, x_grad, weight_grad = results(on_all_logits, head, x, labels)
    assert torch.allclose(x.grad, x_grad, atol=1e-7)
    assert torch.allclose(head.weight.grad, weight_grad, atol=1e-7)


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_what_is_frozen_has_no_gradient_and_the_other_the_same(frozen: str) -> None:
    head, x, labels = case()
    _, x_grad, weight_grad = results(on_all_logits, head, x, labels)
    (x if frozen == "x" else head.weight).requires_grad_(False)
    head(x, labels).backward()
    assert (x.grad is None) == (frozen == "x")
    assert (head.weight.grad is None) == (frozen == "weight")
    seen, expected = (head.weight.grad, weight_grad) if frozen == "x" else (x.grad, x_grad)
    assert torch.allclose(seen, expected, atol=1e-7)


class _Shapes(TorchDispatchMode):
    """Shapes of all that is computed, and how many matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.products = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if (
            isinstance(result, Tensor) and result.shape[-1:] == (V,) and result.shape != (D, V)
        ):  # the weight's transpose
            self.largest = max(self.largest, result.numel() // V)
        self.products += function._schema.name in ("aten::mm", "aten::addmm", "aten::addmm_")
        return result


@pytest.mark.parametrize("learning", [True, False])
def test_no_more_logits_than_a_chunk_exist_and_no_product_is_done_twice(learning: bool) -> None:
    head, x, labels = case()
    chunks = -(-T // ROWS)
    with _Shapes() as seen, nullcontext() if learning else torch.no_grad():
        loss = head(x, labels)
        if learning:
            loss.backward()
    assert torch.allclose(loss, on_all_logits(head, x, labels))
    assert seen.largest == ROWS
    assert seen.products == chunks * (3 if learning else 1)


def test_another_number_of_labels_than_tokens_is_refused() -> None:
    head, x, labels = case()
    for wrong in (labels[:-1], labels.repeat(2)):
        with pytest.raises(RuntimeError):
            head(x, wrong)


@pytest.mark.parametrize("ignored", ["some", "all"])
def test_a_fused_kernel_takes_the_place_of_the_chunks(ignored: str, monkeypatch: pytest.MonkeyPatch) -> None:
    head, x, labels = case(ignored)
    expected = results(LMHead.__call__, head, x, labels)

    def kernel(x_TD: Tensor, weight_VD: Tensor, labels_T: Tensor) -> Tensor:
        assert weight_VD is head.weight
        return F.cross_entropy(F.linear(x_TD, weight_VD), labels_T, reduction="sum")

    monkeypatch.delattr(lm_head, "_ChunkedCrossEntropy")
    head.fused_cross_entropy = kernel
    for mine, theirs in zip(results(LMHead.__call__, head, x, labels), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7, equal_nan=True)


# In the model


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_without_logits_has_the_loss_and_gradients_of_one_with_them(tied: bool) -> None:
    model, ids = build(tie_word_embeddings=tied), tokens(3, 12)
    seen = []
    for output_logits in (True, False):
        model.zero_grad()
        output = model(input_ids=ids, labels=ids, output_logits=output_logits)
        assert (output.logits is None) != output_logits
        output.loss.backward()
        seen.append((output.loss, {name: parameter.grad for name, parameter in model.named_parameters()}))
    (loss, expected), (chunked_loss, gradients) = seen
    assert torch.allclose(chunked_loss, loss, rtol=1e-6)
    assert ("lm_head.weight" in expected) != tied
    for name, gradient in gradients.items():
        assert distance(gradient, expected[name]) < 1e-5, name


@pytest.mark.parametrize("head", [{"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}])
def test_the_loss_of_an_adapted_projection_is_the_same_without_logits(head: dict[str, list[str]]) -> None:
    lora = LoraConfig(**{"target_modules": ["q_proj"], "init_lora_weights": False, **head})
    model, ids = get_peft_model(build(tie_word_embeddings=False), lora), tokens(2, 9)
    expected, output = (model(input_ids=ids, labels=ids, output_logits=given) for given in (True, False))
    assert output.logits is None
    torch.testing.assert_close(output.loss, expected.loss)


def test_logits_are_given_where_there_is_no_label() -> None:
    model, ids = build(), tokens(2, 5)
    assert torch.equal(model(input_ids=ids, output_logits=False).logits, model(input_ids=ids).logits)
