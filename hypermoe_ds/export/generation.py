"""Generate text with a model."""

from typing import Any

from pydantic import Field
from transformers import set_seed

from hypermoe_ds.config import LARGEST_COUNT, Settings
from hypermoe_ds.device import uses_gpu
from hypermoe_ds.modeling import HyperMoEForCausalLM


class SamplingConfig(Settings):
    """Sampling settings."""

    prompt: str = Field(min_length=1, description="text to continue")
    max_new_tokens: int = Field(128, ge=1, le=LARGEST_COUNT, description="maximum number of tokens to generate")
    temperature: float = Field(0.8, ge=0, description="sampling temperature; 0 selects the most likely token")
    top_p: float = Field(0.95, gt=0, le=1, description="probability mass for nucleus sampling")
    seed: int = Field(0, ge=0, lt=2**32, description="random seed for sampling")


def continue_text(model: HyperMoEForCausalLM, tokenizer: Any, sampling: SamplingConfig) -> str:
    """Return the prompt with its continuation. The model runs on a GPU if one is available."""
    set_seed(sampling.seed)
    device = "cuda" if uses_gpu() else "cpu"
    inputs = tokenizer(sampling.prompt, return_tensors="pt", return_token_type_ids=False).to(device)
    drawn = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p}
    output = model.to(device).generate(
        **inputs,
        max_new_tokens=sampling.max_new_tokens,
        pad_token_id=tokenizer.eos_token_id,
        **(drawn if sampling.temperature > 0 else {"do_sample": False}),
    )
    return str(tokenizer.decode(output[0], skip_special_tokens=True))
