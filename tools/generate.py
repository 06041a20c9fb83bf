"""Continue a text with the model of a Hugging Face folder."""

import argparse
from pathlib import Path

from hypermoe_ds.config import validate
from hypermoe_ds.data.output import check_input
from hypermoe_ds.errors import one_line_errors


def main() -> None:
    """Arguments and wiring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, type=Path, metavar="DIR", help="Hugging Face folder")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="text to continue")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="TOKENS", help="default: 128")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default: 0.8)")
    parser.add_argument("--top-p", type=float, default=0.95, help="probability mass to sample from (default: 0.95)")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    arguments = vars(parser.parse_args())
    folder = arguments.pop("model")
    check_input(folder)
    from transformers import AutoTokenizer

    from hypermoe_ds.export.generation import SamplingConfig, continue_text
    from hypermoe_ds.export.hf import read_model

    sampling = validate(SamplingConfig, arguments, "arguments")
    model = read_model(folder)
    print(continue_text(model, AutoTokenizer.from_pretrained(folder), sampling))


if __name__ == "__main__":
    with one_line_errors():
        main()
