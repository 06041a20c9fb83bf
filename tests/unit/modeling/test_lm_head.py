"""Compare the chunked loss of `LMHead` with `F.cross_entropy` on all logits."""

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
ROWS = 5  # rows per chunk; T is not a multiple of this number

Inputs = tuple[LMHead, Tensor, Tensor]
IGNORED = {"none": slice(0, 0), "some": slice(3, 20), "all but one": slice(1, T), "all": slice(0, T)}


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm_head, "_CHUNK_BYTES", ROWS * V * 4)


def make_inputs(ignored: str = "none", dtype: torch.dtype = torch.float32) -> Inputs:
    head = LMHead(D, V).to(dtype)
    labels = torch.randint(0, V, (T,))
    labels[IGNORED[ignored]] = -100
    return head, torch.randn(T, D).to(dtype).requires_grad_(), labels


def reference_loss(head: LMHead, x: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, head.weight).float(), labels)


def results(loss: Callable[..., Tensor], head: LMHead, x: Tensor, labels: Tensor, factor: float = 1.0) -> list[Tensor]:
    """Return the loss and the gradients of factor * loss."""
    value = loss(head, x, labels)
    return [value, *torch.autograd.grad(value * factor, [x, head.weight])]


@pytest.mark.parametrize("factor", [1.0, 0.25, 2.0**16])
@pytest.mark.parametrize("ignored", IGNORED)
def test_loss_and_gradients_match_cross_entropy(ignored: str, factor: float) -> None:
    inputs = make_inputs(ignored)
    seen, expected = (results(loss, *inputs, factor) for loss in (LMHead.__call__, reference_loss))
    assert torch.isnan(expected[0]) == (ignored == "all")
    for ours, theirs in zip(seen, expected, strict=True):
        assert ours.dtype is torch.float32
        largest = theirs.nan_to_num().abs().max().item()
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6 * largest, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_about_as_exact_as_cross_entropy(dtype: torch.dtype) -> None:
    head, x, labels = make_inputs("some", dtype)
    exact_head = LMHead(D, V).double()
    exact_head.weight.data.copy_(head.weight.detach())
    exact_x = x.detach().double().requires_grad_()
    exact = results(lambda h, x, y: F.cross_entropy(h(x), y), exact_head, exact_x, labels)
    seen, with_logits = (results(loss, head, x, labels) for loss in (LMHead.__call__, reference_loss))
    assert [value.dtype for value in seen] == [torch.float32, dtype, dtype]
    for ours, theirs, truth in zip(seen, with_logits, exact, strict=True):
        # The factor is 1.5 because our gradient is rounded twice, before and after scaling. Its error is therefore
        # sqrt(2) times as large.
        assert distance(ours, truth) < 1.5 * distance(theirs, truth) + 1e-6


def test_loss_scaling_prevents_underflow_of_fp16_gradients() -> None:
    head, x, labels = make_inputs(dtype=torch.float16)
    with torch.no_grad():
        x.mul_(1e-3)
    scale = 2.0**10
    seen = results(LMHead.__call__, head, x, labels, scale)[2]
    fp32_head = LMHead(D, V)
    fp32_head.weight.data.copy_(head.weight)
    expected = results(reference_loss, fp32_head, x.detach().float().requires_grad_(), labels, scale)[2]
    assert (expected / scale).abs().median() < 2.0**-19, "without scaling, fp16 would lose digits"
    assert distance(seen, expected) < 5e-3


def test_under_autocast_products_are_bfloat16_and_gradients_fp32() -> None:
    inputs = make_inputs("some")
    with torch.autocast("cpu", torch.bfloat16):
        seen = LMHead.__call__(*inputs)
        logits = F.linear(inputs[1], inputs[0].weight)
    assert logits.dtype is torch.bfloat16
    assert torch.allclose(seen, F.cross_entropy(logits.float(), inputs[2]), rtol=1e-6)
    gradients = torch.autograd.grad(seen, [inputs[1], inputs[0].weight])
    for ours, theirs in zip(gradients, results(reference_loss, *inputs)[1:], strict=True):
        assert ours.dtype is torch.float32
        assert distance(ours, theirs) < 2e-2


def test_gradients_accumulate_over_calls() -> None:
    head, x, labels = make_inputs("some")
    for _ in range(3):
        (head(x, labels) / 3).backward()
    _, x_grad, weight_grad = results(reference_loss, head, x, labels)
    assert torch.allclose(x.grad, x_grad, atol=1e-7)
    assert torch.allclose(head.weight.grad, weight_grad, atol=1e-7)


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_freezing_one_input_does_not_change_the_gradient_of_the_other(frozen: str) -> None:
    head, x, labels = make_inputs()
    _, x_grad, weight_grad = results(reference_loss, head, x, labels)
    (x if frozen == "x" else head.weight).requires_grad_(False)
    head(x, labels).backward()
    assert (x.grad is None) == (frozen == "x")
    assert (head.weight.grad is None) == (frozen == "weight")
    seen, expected = (head.weight.grad, weight_grad) if frozen == "x" else (x.grad, x_grad)
    assert torch.allclose(seen, expected, atol=1e-7)


class _Shapes(TorchDispatchMode):
    """Context manager that records the largest number of logit rows and counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.products = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        transposed_weight = (D, V)
        if isinstance(result, Tensor) and result.shape[-1:] == (V,) and result.shape != transposed_weight:
            self.largest = max(self.largest, result.numel() // V)
        self.products += function._schema.name in ("aten::mm", "aten::addmm", "aten::addmm_")
        return result


@pytest.mark.parametrize("training", [True, False])
def test_only_one_chunk_of_logits_exists_and_no_product_runs_twice(training: bool) -> None:
    head, x, labels = make_inputs()
    chunks = -(-T // ROWS)
    with _Shapes() as seen, nullcontext() if training else torch.no_grad():
        loss = head(x, labels)
        if training:
            loss.backward()
    assert torch.allclose(loss, reference_loss(head, x, labels))
    assert seen.largest == ROWS
    assert seen.products == chunks * (3 if training else 1)


def test_a_wrong_number_of_labels_is_refused() -> None:
    head, x, labels = make_inputs()
    for wrong in (labels[:-1], labels.repeat(2)):
        with pytest.raises(RuntimeError):
            head(x, wrong)


@pytest.mark.parametrize("ignored", ["some", "all"])
def test_a_fused_kernel_replaces_the_chunked_loss(ignored: str, monkeypatch: pytest.MonkeyPatch) -> None:
    head, x, labels = make_inputs(ignored)
    expected = results(LMHead.__call__, head, x, labels)

    def kernel(x_TD: Tensor, weight_VD: Tensor, labels_T: Tensor) -> Tensor:
        assert weight_VD is head.weight
        return F.cross_entropy(F.linear(x_TD, weight_VD), labels_T, reduction="sum")

    monkeypatch.delattr(lm_head, "_ChunkedCrossEntropy")
    head.fused_cross_entropy = kernel
    for ours, theirs in zip(results(LMHead.__call__, head, x, labels), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7, equal_nan=True)


# LMHead in the model


@pytest.mark.parametrize("tied", [True, False])
def test_the_model_has_the_same_loss_and_gradients_without_logits(tied: bool) -> None:
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
def test_a_projection_with_lora_has_the_same_loss_without_logits(head: dict[str, list[str]]) -> None:
    lora = LoraConfig(**{"target_modules": ["q_proj"], "init_lora_weights": False, **head})
    model, ids = get_peft_model(build(tie_word_embeddings=False), lora), tokens(2, 9)
    expected, output = (model(input_ids=ids, labels=ids, output_logits=given) for given in (True, False))
    assert output.logits is None
    torch.testing.assert_close(output.loss, expected.loss)


def test_logits_are_returned_if_there_are_no_labels() -> None:
    model, ids = build(), tokens(2, 5)
    assert torch.equal(model(input_ids=ids, output_logits=False).logits, model(input_ids=ids).logits)
