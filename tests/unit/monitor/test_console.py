"""What a run prints."""

import os
import sys

import pytest
import torch

from hypermoe_ds.monitor.console import Console, step_line

SCALARS = {"loss": 2.34567, "lr": 1.5e-4, "grad_norm": 0.98765, "tokens_per_second": 12345.6}


def test_rank_zero_alone_prints(capsys: pytest.CaptureFixture[str]) -> None:
    for rank in (0, 1):
        Console(rank).log("a line")
    assert capsys.readouterr().out == "a line\n"


def test_the_line_of_a_step_tells_where_it_stands() -> None:
    load_MN = torch.tensor([[0.1, 0.9], [0.5, 0.5]])
    assert step_line(5, 100, SCALARS, 3725.4, load_MN) == (
        "step 5/100 | loss 2.3457 | lr 1.50e-04 | grad norm 0.988 | 12,346 tokens/s | 1:02:05 left"
        " | expert load 10.0% to 90.0%"
    )
    assert step_line(100, 100, SCALARS, 0, torch.empty(0, 2)).endswith(" | 0:00:00 left")


def test_a_console_that_is_gone_does_not_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(0)
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as gone:
        monkeypatch.setattr(sys, "stdout", gone)
        for _ in range(3):
            console.log("step 1")
