"""DeepSpeed's universal form of a checkpoint: each parameter whole, in a folder of its own."""

import contextlib
import io
from argparse import Namespace
from pathlib import Path

from deepspeed.checkpoint import ds_to_universal


def convert_to_universal(checkpoint: Path, output: Path) -> Path:
    """Convert a checkpoint of any ZeRO stage.

    Args:
        checkpoint: a step_ folder.
        output: folder to write.

    Returns:
        The folder that holds one folder a parameter, each with `fp32.pt`.
    """
    arguments = Namespace(
        input_folder=str(checkpoint),
        output_folder=str(output),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=False,
    )
    # It shows its progress, and what the tools print is their own.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        ds_to_universal.main(arguments)
    return output / "zero"
