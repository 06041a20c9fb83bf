"""Lock a run folder so that only one job trains in it."""

import errno
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hypermoe_ds.errors import UserError
from hypermoe_ds.parallel.control_group import ControlGroup

_LOGGER = logging.getLogger(__name__)


class RunLock:
    """A lock on a run folder, held by this process.

    The operating system releases the lock when the process ends for any reason, even if other hosts share the file
    system. Child processes do not inherit the lock.

    Args:
        folder: the run folder; created if it does not exist.

    Raises:
        UserError: another process holds the lock, or the folder is not writable.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / "lock"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+", encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"run.dir={folder}", f"cannot be written ({error.strerror})", "choose another run.dir"
            ) from None
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                hint = "only one job at a time may use this run folder"
                _LOGGER.warning("warning: %s cannot be locked (%s): %s", path, error.strerror, hint)
                return
            self._file.seek(0)
            holder = self._file.read().strip() or "another process"
            self._file.close()
            raise UserError(
                f"run.dir={folder}", f"{holder} is training in it", "end that job or choose another run.dir"
            ) from None
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._file.flush()


@contextmanager
def run_lock(folder: Path, ranks: ControlGroup) -> Iterator[None]:
    """Lock a run folder for this job (collective); create the folder if it does not exist.

    Raises:
        UserError: another job is training in the folder, or the folder is not writable.
    """
    locks = []
    ranks.run_on_rank0(lambda: locks.append(RunLock(folder)))
    yield
