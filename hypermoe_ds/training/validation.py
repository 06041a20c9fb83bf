"""Validate a run: losses by dataset, the contribution of the HyperExperts, and sample texts."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hypermoe_ds.data.loader import validation_batches
from hypermoe_ds.data.tokenizer import encode_as_text
from hypermoe_ds.data.validation_set import ValidationSet
from hypermoe_ds.errors import UserError
from hypermoe_ds.training.evaluation import Evaluation, evaluate, without_hyper_experts
from hypermoe_ds.training.settings import EvaluationConfig

Batches = Iterator[dict[str, Tensor]]


@dataclass(frozen=True)
class Validation:
    """The result of a validation.

    Attributes:
        values: metrics by key.
        samples: each prompt of `evaluation.prompts` with its greedy continuation.
    """

    values: dict[str, float]
    samples: list[tuple[str, str]]


class Validator:
    """Validate the weights of an engine.

    Args:
        engine: the DeepSpeed engine.
        datasets: the validation datasets by name.
        bytes_per_token: bytes of text per token by dataset, for datasets with a known value.
        config: what to measure.
        tokenizer: the run's tokenizer.
        micro_batch_size: sequences per forward pass on each rank.
        document_end: id of the token that ends each document; None disables document masking.
        each: function that wraps an iterator over batches, for example to report progress. It is called with the
            iterator and the number of batches, and returns an iterator over the same batches.
    """

    def __init__(
        self,
        engine: Any,
        datasets: Mapping[str, ValidationSet],
        bytes_per_token: Mapping[str, float],
        config: EvaluationConfig,
        tokenizer: Any,
        micro_batch_size: int,
        document_end: int | None,
        each: Callable[[Batches, int], Batches],
    ) -> None:
        self._engine = engine
        self._datasets = datasets
        self._bytes_per_token = bytes_per_token
        self._tokenizer = tokenizer
        self._prompt_tokens = config.prompt_tokens
        self._micro_batch_size = micro_batch_size
        self._document_end = document_end
        self._each = each
        longest = engine.module.config.max_position_embeddings - config.prompt_tokens
        self._prompts = {prompt: encode_prompt(tokenizer, prompt, longest) for prompt in config.prompts}
        self._measures_contribution = config.hyper_expert_contribution and engine.module.model.hypernetwork is not None

    def __call__(self) -> Validation:
        """Validate on all datasets (collective), then put the engine back into training mode."""
        self._engine.eval()
        values = validation_values(self._evaluate(), self._bytes_per_token)
        if self._measures_contribution:
            with without_hyper_experts(self._engine.module):
                values |= contribution_values(values, self._evaluate())
        samples = [(prompt, self._continue(ids)) for prompt, ids in self._prompts.items()]
        self._engine.train()
        return Validation(values, samples)

    def _evaluate(self) -> dict[str, Evaluation]:
        return {name: self._evaluate_one(dataset) for name, dataset in self._datasets.items()}

    def _evaluate_one(self, dataset: ValidationSet) -> Evaluation:
        rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        batches = validation_batches(
            dataset,
            self._micro_batch_size,
            rank,
            ranks,
            self._engine.module.config.vocab_size,
            self._document_end,
        )
        total = -(-len(dataset) // (self._micro_batch_size * ranks))
        return evaluate(self._engine, self._each(batches, total), self._engine.device)

    def _continue(self, ids: list[int]) -> str:
        """Continue a prompt greedily.

        All ranks run the same forward passes, because a forward pass is collective with expert parallelism.
        """
        tokens = continue_greedily(self._engine, ids, self._prompt_tokens, self._engine.device)
        end = self._tokenizer.eos_token_id
        kept = tokens[: tokens.index(end)] if end in tokens else tokens
        return str(self._tokenizer.decode(kept))


def encode_prompt(tokenizer: Any, prompt: str, longest: int) -> list[int]:
    """Return the token ids of a prompt.

    Raises:
        UserError: the prompt has no tokens, or more than `longest` tokens.
    """
    ids = encode_as_text(tokenizer, prompt)
    if not ids:
        raise UserError(f"evaluation.prompts: {prompt!r}", "has no tokens", "give a text or remove it")
    if len(ids) > longest:
        problem = f"has {len(ids)} tokens; with evaluation.prompt_tokens, the model allows {max(longest, 0)}"
        raise UserError(f"evaluation.prompts: {prompt[:80]!r}", problem, "shorten it or lower evaluation.prompt_tokens")
    return list(ids)


@torch.no_grad()
def continue_greedily(model: Callable[..., Any], ids: list[int], new_tokens: int, device: torch.device) -> list[int]:
    """Continue a prompt with the most likely tokens (collective).

    Args:
        model: the model or engine, in evaluation mode.
        ids: the prompt.
        new_tokens: number of tokens to add.
        device: device of the model.
    """
    input_ids, cache, added = torch.tensor([ids], device=device), None, []
    for _ in range(new_tokens):
        output = model(input_ids=input_ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, input_ids = output.past_key_values, output.logits[:, -1].argmax(-1, keepdim=True)
        added.append(input_ids)
    return [int(token) for token in torch.cat(added, dim=1)[0].tolist()]


def validation_values(results: Mapping[str, Evaluation], bytes_per_token: Mapping[str, float]) -> dict[str, float]:
    """Return loss, perplexity and bits per byte, for each dataset and overall.

    Bits per byte are loss / ln 2 * tokens / bytes (The Pile, arXiv 2101.00027, section 3.1).

    Args:
        results: results by dataset.
        bytes_per_token: bytes of text per token by dataset; the overall bits per byte need the values of all datasets.
    """
    mean = _mean(results)
    values = {"valid_loss": mean.loss, "valid_perplexity": mean.perplexity}
    if bytes_per_token.keys() >= results.keys():
        size = sum(result.tokens * bytes_per_token[name] for name, result in results.items())
        values["valid_bits_per_byte"] = mean.loss * mean.tokens / size / math.log(2)
    for name, result in results.items():
        values |= {f"valid_loss/{name}": result.loss, f"valid_perplexity/{name}": result.perplexity}
        if name in bytes_per_token:
            values[f"valid_bits_per_byte/{name}"] = result.loss / bytes_per_token[name] / math.log(2)
    return values


def contribution_values(values: Mapping[str, float], without: Mapping[str, Evaluation]) -> dict[str, float]:
    """Return the losses without HyperExperts, and how far they exceed the losses with HyperExperts.

    Args:
        values: result of `validation_values` with HyperExperts.
        without: results without HyperExperts, by dataset.
    """
    losses = {"": _mean(without).loss, **{f"/{name}": result.loss for name, result in without.items()}}
    absolute = {f"valid_loss_without_hyper_experts{item}": loss for item, loss in losses.items()}
    higher_by = {
        f"hyper_expert_contribution{item}": loss - values[f"valid_loss{item}"] for item, loss in losses.items()
    }
    return absolute | higher_by


def _mean(results: Mapping[str, Evaluation]) -> Evaluation:
    tokens = sum(result.tokens for result in results.values())
    return Evaluation(math.fsum(result.loss * result.tokens for result in results.values()) / tokens, tokens)
