"""Create a run folder from a Hugging Face model. Training then starts at step 0 from the weights of this model.

HyperMoE models keep all their weights. Mixtral, OLMoE and Qwen3-MoE models get HyperExperts whose initial output is
zero. With --upcycle, a dense Llama, Mistral or Qwen3 model becomes a Mixture of Experts that initially computes the
same function.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from hypermoe_ds.config import apply_overrides, validate
from hypermoe_ds.errors import UserError
from hypermoe_ds.files import check_input, check_output
from hypermoe_ds.process import one_line_errors
from hypermoe_ds.run_config import ModelSection, model_section

if TYPE_CHECKING:
    from hypermoe_ds.export.upcycle import Upcycling


def main() -> None:
    """Convert the model and print how to train it."""
    given = parse_arguments()
    if not 0 <= given.seed < 2**32:
        raise UserError(f"--seed={given.seed}", "is out of range", "give 0 to 4294967295")
    check_output(given.output)
    check_input(given.checkpoint)
    fields = validate(ModelSection, apply_overrides({}, given.fields), "arguments").model_dump(exclude_unset=True)
    upcycling = upcycling_of(given)
    from hypermoe_ds.checkpoint.init_from_weights import init_from_weights
    from hypermoe_ds.checkpoint.weights import PRECISIONS
    from hypermoe_ds.export.from_hf import open_folder
    from hypermoe_ds.export.hf_config_mapping import notes_on
    from hypermoe_ds.training.state import TrainState

    weights = open_folder(given.checkpoint, upcycling, fields, given.seed)
    [precision] = [name for name, dtype in PRECISIONS.items() if dtype == weights.dtype]
    settings = {"model": model_section(weights.config), "train": {"precision": precision}}
    tokenizer = given.tokenizer or given.checkpoint
    run = init_from_weights(
        given.output, weights.config, weights.tensors(), tokenizer, settings, TrainState().to_dict()
    )
    for note in notes_on(given.checkpoint):
        print(f"note: {note}")
    counts = weights.config.parameter_counts()
    print(f"{run.path}: {counts.total / 1e6:,.1f} M parameters, {counts.active / 1e6:,.1f} M active, at step 0")
    print(f"recipe: copy `model` from {run.model_section}; create token files with the tokenizer {run.tokenizer}")
    print(
        f"start: deepspeed pretrain/train.py --config RECIPE.yaml --deepspeed_config ds_configs/zero1.json "
        f"run.dir={run.path} train.precision={precision}"
    )


def upcycling_of(given: argparse.Namespace) -> "Upcycling | None":
    """Return the upcycling options, or None without --upcycle.

    Raises:
        UserError: an upcycling option is given without --upcycle, or a required option is missing.
    """
    if given.upcycle:
        if given.experts is None or given.top_k is None:
            raise UserError("--upcycle", "needs --experts and --top-k", "give both")
        from hypermoe_ds.export.upcycle import Upcycling

        return Upcycling(given.experts, given.top_k, given.granularity, given.noise, given.seed, given.router_std)
    for name, default in (("experts", None), ("top_k", None), ("granularity", 1), ("noise", 0.0), ("router_std", None)):
        if (value := getattr(given, name)) != default:
            raise UserError(f"--{name.replace('_', '-')}={value}", "needs --upcycle", "add this option")
    return None


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint", required=True, type=Path, metavar="DIR", help="Hugging Face folder with safetensors"
    )
    parser.add_argument("--output", required=True, type=Path, metavar="RUN_DIR", help="run folder to create")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="tokenizer folder (default: --checkpoint)")
    parser.add_argument("--upcycle", action="store_true", help="convert the MLPs of a dense model to experts")
    parser.add_argument("--experts", type=int, metavar="N", help="experts per layer")
    parser.add_argument("--top-k", type=int, metavar="K", help="experts per token")
    parser.add_argument(
        "--granularity",
        type=int,
        default=1,
        metavar="G",
        help="number of slices per MLP; must divide N and K (default: 1)",
    )
    parser.add_argument(
        "--noise", type=float, default=0.0, metavar="STD",
        help="noise added to each expert, in standard deviations of the dense weights (default: 0)",
    )  # fmt: skip
    parser.add_argument(
        "--router-std", type=float, metavar="STD",
        help="standard deviation of the router's logits for inputs with a mean square of 1; for K = 1, larger "
        "values are more stable but change the function (default: 1e-4 for K = 1, else initializer_range * "
        "sqrt(hidden_size))",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="seed for the router, noise and HyperExperts (default: 0)")
    parser.add_argument(
        "fields",
        nargs="*",
        metavar="key=value",
        help="for a model without HyperExperts: fields of the recipe's section `model` that its weights do not "
        "determine, such as adapter_size, hypernetwork or router_aux_loss_coef",
    )
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    with one_line_errors():
        main()
