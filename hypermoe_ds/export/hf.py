"""Write a model as a Hugging Face folder that loads without this package."""

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import StateDictSplit, split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from transformers.dynamic_module_utils import custom_object_save

from hypermoe_ds.checkpoint.hf_folder import CONFIG, read_hypermoe_config, read_json
from hypermoe_ds.checkpoint.run_folder import RunFolder, check_step
from hypermoe_ds.checkpoint.safetensors_folder import INDEX, FolderWeights
from hypermoe_ds.checkpoint.weights import load_model, model_of
from hypermoe_ds.data.tokenizer import load_tokenizer
from hypermoe_ds.errors import UserError
from hypermoe_ds.export.streaming import streamed_logits
from hypermoe_ds.export.tokenizer import write_tokenizer
from hypermoe_ds.export.weight_loader import LazyWeights, WeightLoader, read_folder
from hypermoe_ds.files import check_output, check_room, scratch_folder
from hypermoe_ds.modeling import HyperMoEForCausalLM, meta_model
from hypermoe_ds.progress import Progress, progress

_GENERATION = "generation_config.json"
_CONTROL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_TOKENS_TO_CHECK = 16


def export(
    loader: WeightLoader,
    tokenizer: Path,
    output: Path,
    shard_bytes: int,
    same_function: WeightLoader | None = None,
    add: Callable[[Path], None] | None = None,
    chat_template: Path | None = None,
) -> None:
    """Write a folder with weights (safetensors), config, modeling files and tokenizer.

    The folder is written under a temporary name, read back, compared with the source and then renamed. At any
    time, memory holds only the tensors of one weight file or, during the comparison, of one layer.

    Args:
        loader: tensors of the model, in the precision to write.
        tokenizer: folder of the model's tokenizer.
        output: folder to create.
        shard_bytes: maximum size of a file with more than one tensor.
        same_function: model whose logits the folder must reproduce up to rounding; None requires logits that
            are bitwise identical to those of `loader`.
        add: function that writes more files to the folder, such as a model card.
        chat_template: file with a Jinja chat template; None keeps the tokenizer's template.

    Raises:
        UserError: the folder exists and is not empty, there is too little disk space, the tokenizer or the template is
            invalid, or the model's logits are NaN or infinite.
        RuntimeError: the written folder differs from the source and has been deleted.
    """
    check_output(output)
    model = _with_tokens_of(tokenizer, meta_model(loader.config).to(loader.dtype))
    needed = sum(shape.numel() for shape in loader.shapes.values()) * loader.dtype.itemsize
    with scratch_folder(output) as scratch:
        check_room(output, scratch, needed)
        folder = scratch / output.name
        write_tokenizer(tokenizer, folder, chat_template)
        _write_config_and_code(model, folder)
        _write_weights(loader, model, folder, shard_bytes)
        _compare_tensors(loader, folder)
        _compare_logits(loader, folder, same_function)
        if add is not None:
            add(folder)
        if output.exists():
            output.rmdir()
        folder.rename(output)


def shard_bytes_of(size: str) -> int:
    """Convert a size such as "200MB" to bytes, in Transformers' units: 1 MB is 10^6 bytes.

    Raises:
        UserError: `size` is not a valid size.
    """
    match = re.fullmatch(r"(\d{1,12})\s*(KB|MB|GB|TB)", size.strip(), re.IGNORECASE)
    if match is None or int(match[1]) == 0:
        raise UserError(f"--max-shard-size={size}", "is not a size", "give a number and a unit, such as 200MB or 5GB")
    return int(match[1]) * _UNITS[match[2].upper()]


def load_any(folder: Path, step: int | None = None) -> tuple[HyperMoEForCausalLM, Path]:
    """Load the model of a run folder or of a Hugging Face folder.

    Args:
        folder: the folder.
        step: step of a run's checkpoint; None selects the newest. It must be None for a Hugging Face folder.

    Returns:
        The model, in the precision of its weights and in evaluation mode, and the folder of its tokenizer.

    Raises:
        UserError: the folder is of neither kind, or its files are missing, are damaged or belong to a different model.
    """
    run = RunFolder(folder)
    if run.exists():
        return load_model(run, step), run.tokenizer
    check_step(step, [folder])
    if not (folder / CONFIG).exists():
        raise UserError(
            f"--checkpoint={folder}", "is neither a run folder nor a Hugging Face folder", "give one of them"
        )
    return read_model(folder), folder


def read_model(folder: Path) -> HyperMoEForCausalLM:
    """Load the model of a Hugging Face folder, in the precision of its safetensors files.

    Only the ids of control tokens are read from generation_config.json.

    Raises:
        UserError: the folder has no HyperMoE model, its files are damaged or not safetensors, or the tensors do not
            match config.json.
    """
    weights = read_folder(folder, read_hypermoe_config(folder))
    model = model_of(weights.config, {name: weights.read(name) for name in weights.shapes})
    if (folder / _GENERATION).exists():
        _read_control_tokens(model, folder)
    return model


def _read_control_tokens(model: HyperMoEForCausalLM, folder: Path) -> None:
    content = read_json(folder, _GENERATION)
    for key in _CONTROL_IDS:
        value = content.get(key)
        if value is None:
            continue
        ids = value if key == "eos_token_id" and isinstance(value, list) else [value]
        if not ids or not all(type(i) is int and 0 <= i < model.config.vocab_size for i in ids):
            where = f"{folder / _GENERATION}: {key}={str(value)[:80]}"
            raise UserError(where, f"is not an id below vocab_size={model.config.vocab_size}", "correct that key")
        setattr(model.generation_config, key, value)


def _with_tokens_of(tokenizer: Path, model: HyperMoEForCausalLM) -> HyperMoEForCausalLM:
    ids = load_tokenizer(tokenizer)
    for name in _CONTROL_IDS:
        setattr(model.config, name, getattr(ids, name))
        setattr(model.generation_config, name, getattr(ids, name))
    return model


def _write_config_and_code(model: HyperMoEForCausalLM, folder: Path) -> None:
    """Write everything that `save_pretrained` writes, except the weights."""
    model.config.architectures = [type(model).__name__]
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    custom_object_save(model, folder, config=model.config)
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)


def _write_weights(loader: WeightLoader, model: HyperMoEForCausalLM, folder: Path, shard_bytes: int) -> None:
    """Write the weight files, split and named as in Transformers, and an index if there are several files."""
    empty = {name: torch.empty(shape, dtype=loader.dtype, device="meta") for name, shape in loader.shapes.items()}
    split: StateDictSplit = split_torch_state_dict_into_shards(empty, max_shard_size=shard_bytes)
    with Progress("write", "tensors", len(empty)) as shown:
        for file, names in split.filename_to_tensors.items():
            tensors = {}
            for name in names:
                tensors[name] = loader.read(name).cpu().contiguous()
                shown.update()
            save_file(tensors, folder / file, metadata={"format": "pt"})
            (folder / file).chmod(
                (folder / "config.json").stat().st_mode
            )  # safetensors makes files readable only by the user
            del tensors
    if split.is_sharded:
        metadata = {"total_parameters": model.num_parameters(), **split.metadata}
        index = {"metadata": metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_back(folder: Path) -> LazyWeights:
    """Open the tensors and the configuration of a folder that was just written."""
    files = FolderWeights(folder)
    config = read_hypermoe_config(folder)
    return LazyWeights(config, files.dtype, {name: partial(files.read, name) for name in files.shapes})


def _compare_tensors(loader: WeightLoader, folder: Path) -> None:
    """Compare all tensors bitwise, including NaN values."""
    back = read_back(folder)
    if back.readers.keys() != loader.shapes.keys():
        raise RuntimeError(f"{folder} contains different tensors than were written")
    for name in progress(loader.shapes, "compare", "tensors", len(loader.shapes)):
        if not _same_bits(back.read(name), loader.read(name).cpu()):
            raise RuntimeError(f"{name} differs from the tensor that was written")


def _compare_logits(loader: WeightLoader, folder: Path, same_function: WeightLoader | None) -> None:
    """Compare the logits of a few tokens: bitwise, or up to rounding if `same_function` is given."""
    ids_BS = torch.randint(loader.config.vocab_size, (1, _TOKENS_TO_CHECK), generator=torch.Generator().manual_seed(0))
    found = streamed_logits(read_back(folder), ids_BS)
    if not found.isfinite().all():
        raise UserError("the model", "gives logits that are NaN or Inf", "inspect it with tools/inspect_checkpoint.py")
    expected = streamed_logits(loader if same_function is None else same_function, ids_BS)
    if same_function is None:
        is_same = _same_bits(found, expected)
    else:
        # Baked HyperExperts are rounded to the folder's precision, which may change which experts are selected.
        tolerance = 1e-4 if loader.dtype == torch.float32 else 0.1
        is_same = bool((found - expected).float().norm() <= tolerance * expected.float().norm())
    if not is_same:
        raise RuntimeError(f"{folder} does not reproduce the logits of the exported model")


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
