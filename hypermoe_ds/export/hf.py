"""Writes a model as a Hugging Face folder that loads where this package is absent."""

import shutil
import tempfile
from pathlib import Path

import torch
from transformers import AutoTokenizer

from hypermoe_ds.errors import UserError
from hypermoe_ds.modeling import HyperMoEForCausalLM


def export(model: HyperMoEForCausalLM, tokenizer: Path, output: Path) -> None:
    """Write weights (safetensors), config, modeling files and tokenizer.

    The folder is written beside its place, read back and compared, and only then renamed.

    Args:
        model: the model, in the precision to write.
        tokenizer: its tokenizer's folder.
        output: folder to make.

    Raises:
        UserError: the folder exists and is not empty, or the disk has no room.
    """
    check_output(output)
    ids = AutoTokenizer.from_pretrained(tokenizer)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.config, name, getattr(ids, name))
        setattr(model.generation_config, name, getattr(ids, name))
    output.parent.mkdir(parents=True, exist_ok=True)
    needed = sum(p.numel() * p.element_size() for p in model.parameters())
    free = shutil.disk_usage(output.parent).free
    if free < needed:
        raise UserError(
            str(output), f"needs {needed / 2**30:.2f} GiB and {free / 2**30:.2f} are free", "free some disk"
        )
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}_") as beside:
        folder = Path(beside) / output.name
        shutil.copytree(tokenizer, folder)
        model.save_pretrained(folder)
        _compare(model, folder)
        if output.exists():
            output.rmdir()
        folder.rename(output)


def read_model(folder: Path) -> HyperMoEForCausalLM:
    """The model of a Hugging Face folder, in the precision it was written in.

    Raises:
        UserError: it is no such folder.
    """
    if not (folder / "config.json").is_file():
        raise UserError(
            str(folder), "is no Hugging Face folder (no config.json)", "make one with tools/convert_to_hf.py"
        )
    model: HyperMoEForCausalLM = HyperMoEForCausalLM.from_pretrained(folder)
    model.eval()
    return model


def check_output(output: Path) -> None:
    """Refuse a place that is taken.

    Raises:
        UserError: it is a file or a folder with something in it.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(str(output), "exists already", "remove it or choose another folder")


def _compare(model: HyperMoEForCausalLM, folder: Path) -> None:
    written = read_model(folder).state_dict()
    for name, tensor in model.state_dict().items():
        if not torch.equal(written[name], tensor):
            raise RuntimeError(f"{name} does not read back as it was written")
