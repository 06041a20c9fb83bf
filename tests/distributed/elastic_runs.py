"""Code that ranks run in the tests of elastic resume: save a run under one layout and resume it under others."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from engine_runs import Step, engine_of, logits_of, manager_of, steps_on
from small_runs import GLOBAL_BATCH, Layout, S, random_tokens
from torch import Tensor

from hypermoe_ds.checkpoint.run_folder import RunFolder
from hypermoe_ds.modeling import HyperMoEForCausalLM

BEFORE, AFTER = 4, 10
SPREADS = ((1, 1), (2, 1), (2, 2), (4, 2), (4, 4))  # ranks, expert parallelism
STAGES = (1, 2, 3)
LAYOUTS = tuple(Layout(ranks=ranks, expert=expert, stage=stage) for ranks, expert in SPREADS for stage in STAGES)


def name_of(layout: Layout) -> str:
    """Return a short label for a layout."""
    return f"{layout.ranks} ranks EP {layout.expert} ZeRO {layout.stage}"


def batches_from(layout: Layout, rank: int, step: int) -> Iterator[dict[str, Tensor]]:
    """Yield a rank's micro-batches, starting at `step`. All layouts use the same sequences in each step."""
    for tokens in random_tokens(5, BEFORE + AFTER, GLOBAL_BATCH, S + 1)[step:]:
        for block in tokens.chunk(layout.accumulation):
            own = block.chunk(layout.ranks)[rank]
            yield {"input_ids": own[:, :-1], "labels": own[:, 1:]}


Ended = tuple[list[Step], Tensor]  # steps after the checkpoint, and logits after the last step


def save_each(layouts: list[Layout], folders: list[Path]) -> list[Ended]:
    """Train under each layout, save a checkpoint in the background, and continue training.

    All layouts run in the same processes.
    """
    return [_save(layout, folder) for layout, folder in zip(layouts, folders, strict=True)]


def _save(layout: Layout, folder: Path) -> Ended:
    engine = engine_of(layout, BEFORE + AFTER)
    checkpoints = manager_of(engine, RunFolder(folder))
    batches = batches_from(layout, torch.distributed.get_rank(), 0)
    steps_on(engine, batches, BEFORE)
    checkpoints.save(BEFORE, {"step": BEFORE})
    steps = steps_on(engine, batches, AFTER)
    checkpoints.finish()
    logits = logits_of(engine, 0)
    engine.destroy()
    return steps, logits


def resume_each(layouts: list[Layout], folders: list[Path], again: list[Path]) -> list[Ended]:
    """Resume each run under another layout, save a copy of its checkpoint, and continue training.

    All layouts run in the same processes.
    """
    return [_resume(*run) for run in zip(layouts, folders, again, strict=True)]


def _resume(layout: Layout, folder: Path, other: Path) -> Ended:
    engine = engine_of(layout, BEFORE + AFTER)
    assert manager_of(engine, RunFolder(folder)).resume() == {"step": BEFORE}
    copy = manager_of(engine, RunFolder(other))
    copy.save(BEFORE, {"step": BEFORE})
    copy.finish()
    steps = steps_on(engine, batches_from(layout, torch.distributed.get_rank(), BEFORE), AFTER)
    logits = logits_of(engine, 0)
    engine.destroy()
    return steps, logits


def first_norms(layouts: list[Layout]) -> list[float]:
    """Return the gradient norm of the first step under each layout. All layouts run in the same processes."""
    norms = []
    for layout in layouts:
        engine = engine_of(layout, BEFORE + AFTER)
        [step] = steps_on(engine, batches_from(layout, torch.distributed.get_rank(), 0), 1)
        norms.append(step.grad_norm)
        engine.destroy()
    return norms


def save_untrained_and_train(layout: Layout, folder: Path) -> list[Step]:
    """Save a checkpoint of the initial weights, train, and return the training steps."""
    engine = engine_of(layout, BEFORE + AFTER)
    checkpoints = manager_of(engine, RunFolder(folder))
    checkpoints.save(0, {"step": 0})
    checkpoints.finish()
    return steps_on(engine, batches_from(layout, torch.distributed.get_rank(), 0), AFTER)


def train_untrained(layout: Layout, folder: Path) -> list[Step]:
    """Resume from the saved weights in an engine with different initial weights, train, and return the steps."""
    engine = build_engine_with_other_weights(layout)
    assert manager_of(engine, RunFolder(folder)).resume() == {"step": 0}
    return steps_on(engine, batches_from(layout, torch.distributed.get_rank(), 0), AFTER)


def build_engine_with_other_weights(layout: Layout) -> Any:
    """Build an engine whose initial weights are 1.5 times the usual ones."""
    initialise = HyperMoEForCausalLM.__init__

    def larger(model: HyperMoEForCausalLM, *arguments: Any) -> None:
        initialise(model, *arguments)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5)

    HyperMoEForCausalLM.__init__ = larger  # type: ignore[method-assign] (only affects this test process)
    return engine_of(layout, BEFORE + AFTER)


def with_one_micro_batch(layout: Layout) -> Layout:
    """Return the layout with micro-batches of two sequences, each with its own load-balancing loss."""
    accumulation = GLOBAL_BATCH // layout.ranks // 2
    return replace(layout, accumulation=accumulation, model={"router_aux_loss_scope": "micro_batch"})
