"""Continue a text with the model of a Hugging Face folder."""

import argparse
from pathlib import Path

import torch
from transformers import AutoTokenizer, set_seed

from hypermoe_ds.errors import one_line_errors
from hypermoe_ds.export.hf import read_model


def main() -> None:
    """Arguments and wiring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, type=Path, metavar="DIR", help="Hugging Face folder")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="text to continue")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="TOKENS", help="default: 128")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default: 0.8)")
    parser.add_argument("--top-p", type=float, default=0.95, help="probability mass to sample from (default: 0.95)")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    arguments = parser.parse_args()

    model = read_model(arguments.model)
    set_seed(arguments.seed)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = tokenizer(arguments.prompt, return_tensors="pt", return_token_type_ids=False).to(device)
    sampling = {"do_sample": True, "temperature": arguments.temperature, "top_p": arguments.top_p}
    output = model.to(device).generate(
        **inputs,
        max_new_tokens=arguments.max_new_tokens,
        pad_token_id=tokenizer.eos_token_id,
        **(sampling if arguments.temperature > 0 else {"do_sample": False}),
    )
    print(tokenizer.decode(output[0], skip_special_tokens=True))


if __name__ == "__main__":
    with one_line_errors():
        main()
