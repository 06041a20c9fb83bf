"""Load the operators that DeepSpeed compiles, even if an earlier process was killed while loading them."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.utils.cpp_extension import get_default_build_root


def operators_folder() -> Path:
    """Return the folder of the compiled operators, with one subfolder per operator."""
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())


@contextmanager
def without_stale_locks() -> Iterator[None]:
    """Remove the stale locks of killed processes before the code inside the context loads operators.

    While a process loads an operator, torch keeps a file named `lock` in the operator's folder. If the process is
    killed, the file remains, and every later process would wait forever for its removal. Inside the context, each
    process therefore also holds a shared `flock`, which the operating system releases when the process ends. If no
    process holds the `flock`, all `lock` files are stale.
    """
    folder = operators_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".loading").open("w") as shared_lock:
        if any(folder.glob("*/lock")):
            fcntl.flock(shared_lock, fcntl.LOCK_EX)
            for lock in folder.glob("*/lock"):
                lock.unlink(missing_ok=True)
        fcntl.flock(shared_lock, fcntl.LOCK_SH)
        yield
