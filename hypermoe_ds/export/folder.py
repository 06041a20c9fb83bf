"""The tensors of a Hugging Face folder, read from its safetensors files one at a time."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hypermoe_ds.errors import UserError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl")


class FolderWeights:
    """Tensors by the names that the files give them.

    Args:
        folder: a Hugging Face folder with `model.safetensors`, or several files and their index.

    Attributes:
        folder: the folder.
        shapes: names and shapes.
        dtype: the widest precision among the tensors.

    Raises:
        UserError: there are no safetensors, a file is missing or damaged, or a tensor is of another type.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shapes: dict[str, torch.Size] = {}
        self._files: dict[str, Path] = {}
        dtypes = set()
        for path in _files(folder):
            try:
                with safe_open(path, "pt") as file:
                    for name in file.keys():  # noqa: SIM118 (no dict)
                        tensor = file.get_slice(name)
                        self.shapes[name], self._files[name] = torch.Size(tensor.get_shape()), path
                        dtypes.add(_dtype(path, name, tensor.get_dtype()))
            except (OSError, SafetensorError) as error:
                raise UserError(str(path), f"cannot be read ({error})", "copy the folder again") from None
        self.dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32

    def read(self, name: str) -> Tensor:
        """A tensor as it is stored, no longer mapped to its file."""
        with safe_open(self._files[name], "pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor.clone()


def _dtype(path: Path, name: str, stored: str) -> torch.dtype:
    if stored not in _DTYPES:
        raise UserError(f"{path}: {name}", f"is stored as {stored}", f"save the model as one of {', '.join(_DTYPES)}")
    return _DTYPES[stored]


def _files(folder: Path) -> list[Path]:
    """The safetensors files of a folder."""
    if (folder / INDEX).is_file():
        try:
            index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            return [folder / name for name in sorted(set(index["weight_map"].values()))]
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise UserError(str(folder / INDEX), f"cannot be read ({error})", "copy the folder again") from None
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    pickles = sorted(path.name for kind in _PICKLES for path in folder.glob(kind))
    if pickles:
        raise UserError(
            str(folder / pickles[0]),
            "is a pickle, which can run any code when it is read",
            "save the model as safetensors: Transformers' save_pretrained does",
        )
    raise UserError(str(folder), f"holds no weights (neither {WEIGHTS} nor {INDEX})", "give a Hugging Face folder")
