"""Loading of the operators that DeepSpeed compiles, after a process was killed in the middle of it."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.utils.cpp_extension import get_default_build_root


def operators_folder() -> Path:
    """Return the folder of the compiled operators, one subfolder each."""
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())


@contextmanager
def without_stale_locks() -> Iterator[None]:
    """Remove the locks that killed processes left, then keep others from removing one while an operator is loaded.

    torch creates a file `lock` in the operator's folder each time that a process loads it. If that process is killed,
    the file stays, and every later process waits for it without end. Here each process that loads holds a shared lock
    which ends with the process: once there is no other holder, a file `lock` belongs to nobody.
    """
    folder = operators_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".loading").open("w") as holders:
        if any(folder.glob("*/lock")):
            fcntl.flock(holders, fcntl.LOCK_EX)
            for lock in folder.glob("*/lock"):
                lock.unlink(missing_ok=True)
        fcntl.flock(holders, fcntl.LOCK_SH)
        yield
