"""Where the ranks meet."""

import socket

import pytest

from hypermoe_ds.errors import UserError
from hypermoe_ds.training.engine import start_ranks


def test_a_port_that_is_taken_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        where = {
            "RANK": "0",
            "WORLD_SIZE": "1",
            "LOCAL_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        for name, value in where.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match=rf"^port {port} of 127.0.0.1: .*--master_port"):
            start_ranks()
