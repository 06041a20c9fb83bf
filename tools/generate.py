"""Generate text with the model of a run folder or a Hugging Face folder."""

import argparse
from pathlib import Path

from hypermoe_ds.config import validate
from hypermoe_ds.files import check_input
from hypermoe_ds.process import one_line_errors


def main() -> None:
    """Print the prompt with its continuation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--checkpoint", required=True, type=Path, metavar="DIR", help="run folder or Hugging Face folder"
    )
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="text to continue")
    parser.add_argument(
        "--max-new-tokens", type=int, default=128, metavar="N", help="maximum new tokens (default: 128)"
    )
    parser.add_argument("--temperature", type=float, default=0.8, help="0 selects the most likely token (default: 0.8)")
    parser.add_argument(
        "--top-p", type=float, default=0.95, help="probability mass for nucleus sampling (default: 0.95)"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed for sampling (default: 0)")
    arguments = vars(parser.parse_args())
    folder = arguments.pop("checkpoint")
    check_input(folder)
    from hypermoe_ds.data.tokenizer import load_tokenizer
    from hypermoe_ds.export.generation import SamplingConfig, continue_text
    from hypermoe_ds.export.hf import load_any

    sampling = validate(SamplingConfig, arguments, "arguments")
    model, tokenizer = load_any(folder)
    print(continue_text(model, load_tokenizer(tokenizer), sampling))


if __name__ == "__main__":
    with one_line_errors():
        main()
