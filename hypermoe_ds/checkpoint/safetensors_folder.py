"""Read the tensors of a Hugging Face folder from its safetensors files."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hypermoe_ds.checkpoint.hf_folder import FETCH_AGAIN, read_json, short
from hypermoe_ds.errors import UserError
from hypermoe_ds.files import file_of
from hypermoe_ds.modeling import HyperMoEConfig

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_DERIVED = re.compile(r".*\.rotary_emb\.inv_freq")  # saved by old Transformers versions; computed from rope_theta

Reader = Callable[[], Tensor]


def weight_files(folder: Path) -> list[Path]:
    """List the safetensors files of a folder.

    Raises:
        UserError: there are no safetensors files, the index is damaged or names another kind of file, or a file is
            missing or is a symbolic link out of the folder.
    """
    if (folder / INDEX).exists():
        weight_map = read_json(folder, INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{folder / INDEX}: weight_map={short(weight_map)}", "names no files", FETCH_AGAIN)
        for name, file in weight_map.items():
            if not isinstance(file, str) or not file.endswith(".safetensors"):
                where = f"{folder / INDEX}: weight_map[{short(name)}]={short(file)}"
                raise UserError(where, "is not a safetensors file", "save the model as safetensors")
        return [file_of(folder, name) for name in sorted(set(weight_map.values()))]
    if (folder / WEIGHTS).exists():
        return [file_of(folder, WEIGHTS)]
    pickles = sorted(path.name for kind in _PICKLES for path in folder.glob(kind))
    if pickles:
        raise UserError(
            str(folder / pickles[0]),
            "is a pickle, which can run code when it is read",
            "save the model as safetensors: Transformers' save_pretrained does",
        )
    raise UserError(str(folder), f"has no weights (neither {WEIGHTS} nor {INDEX})", "give a Hugging Face folder")


class SafetensorsFolder:
    """Tensors in the safetensors files of a folder, by name.

    Args:
        folder: a Hugging Face folder.

    Attributes:
        folder: the folder.
        paths: the files.
        shapes: shape of each tensor.
        dtypes: dtype of each tensor in safetensors notation ("F32", "BF16").

    Raises:
        UserError: `weight_files` refuses the folder, a file is damaged, or two files contain the same tensor.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.paths = weight_files(folder)
        self.shapes: dict[str, torch.Size] = {}
        self.dtypes: dict[str, str] = {}
        self._file_of: dict[str, Path] = {}
        for path in self.paths:
            try:
                with safe_open(path, "pt") as file:
                    for name in file.keys():  # noqa: SIM118 (no dict)
                        if name in self._file_of:
                            other = self._file_of[name].name
                            raise UserError(f"{path}: {short(name)}", f"is also in {other}", FETCH_AGAIN)
                        part = file.get_slice(name)
                        self.shapes[name], self.dtypes[name] = torch.Size(part.get_shape()), part.get_dtype()
                        self._file_of[name] = path
            except (OSError, SafetensorError) as error:
                raise _damaged(path, error) from None

    def path_of(self, name: str) -> Path:
        """Return the file of a tensor."""
        return self._file_of[name]

    def map(self, name: str) -> Tensor:
        """Memory-map a tensor, so that only the parts that are used are read from disk.

        Raises:
            UserError: the file is damaged.
        """
        path = self._file_of[name]
        try:
            with safe_open(path, "pt") as file:
                tensor: Tensor = file.get_tensor(name)
        except (OSError, SafetensorError, RuntimeError) as error:
            raise _damaged(path, error) from None
        return tensor

    def read(self, name: str) -> Tensor:
        """Read a tensor in its stored dtype, as a copy in memory.

        Raises:
            UserError: the file is damaged.
        """
        return self.map(name).clone()


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(str(path), f"cannot be read ({error})", FETCH_AGAIN)


class FolderWeights(SafetensorsFolder):
    """Weights in fp32, bf16 or fp16 in the safetensors files of a folder.

    Args:
        folder: a Hugging Face folder with `model.safetensors`, or with several files and their index.

    Attributes:
        dtype: dtype of all tensors, or fp32 if they have different dtypes.

    Raises:
        UserError: `SafetensorsFolder` refuses the folder, or a tensor has a dtype other than fp32, bf16 and fp16.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        for name, stored in self.dtypes.items():
            if stored not in _DTYPES:
                where = f"{self.path_of(name)}: {name}"
                raise UserError(where, f"is stored as {stored}", f"save the model as one of {', '.join(_DTYPES)}")
        dtypes = {_DTYPES[stored] for stored in self.dtypes.values()}
        self.dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32


class TrackedTensors:
    """The tensors of a folder, with a record of the requested tensors, so that unused tensors can be found."""

    def __init__(self, files: FolderWeights) -> None:
        self.files = files
        self._names: set[str] = set()

    def holds(self, name: str) -> bool:
        return name in self.files.shapes

    def reader(self, name: str, shape: tuple[int, ...]) -> Reader:
        """Return a function that reads a tensor, after checking that the tensor has the given shape."""
        if not self.holds(name):
            raise UserError(f"{self.files.folder}: {name}", "is missing", "copy the folder again")
        found = tuple(self.files.shapes[name])
        if found != tuple(shape):
            raise UserError(
                f"{self.files.folder}: {name}",
                f"is {list(found)}, but {list(shape)} according to config.json",
                "correct config.json",
            )
        self._names.add(name)
        return partial(self.files.read, name)

    def refuse_unused(self, model_config: HyperMoEConfig) -> None:
        """Refuse tensors that were never requested, so that no tensor is dropped silently."""
        head, embedding = "lm_head.weight", "model.embed_tokens.weight"
        for name in self.files.shapes:
            if name in self._names or _DERIVED.fullmatch(name):
                continue
            tied = name == head and model_config.tie_word_embeddings
            if tied and torch.equal(self.files.read(head), self.files.read(embedding)):
                continue
            reason = "differs from the embedding it is tied to" if tied else "is not part of a HyperMoE model"
            raise UserError(f"{self.files.folder}: {name}", reason, "choose a model without it")
