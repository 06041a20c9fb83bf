"""Pretrain a HyperMoE language model with DeepSpeed.

deepspeed [--hostfile F] pretrain/train.py --config R.yaml --deepspeed_config F.json [section.key=value ...]
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from hypermoe_ds.errors import EXIT_SAVED, one_line_errors
from hypermoe_ds.run_config import RunConfig, load_run_config
from hypermoe_ds.training.ds_config import load_deepspeed_json, merge


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="R.yaml", help="recipe: model, data, batch, schedule, ...")
    parser.add_argument("--deepspeed_config", required=True, metavar="F.json", help="a file of ds_configs/")
    parser.add_argument("--local_rank", type=int, help="given by the launcher")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override a setting of the recipe")
    return parser.parse_intermixed_args()


if __name__ == "__main__":  # most mistakes end here: what is imported below takes 6 s
    with one_line_errors():
        given = parse_arguments()
        deepspeed_json = load_deepspeed_json(given.deepspeed_config)
        recipe = load_run_config(given.config, given.overrides)

import torch

from hypermoe_ds.checkpoint.lock import claimed
from hypermoe_ds.checkpoint.manager import CheckpointManager
from hypermoe_ds.checkpoint.run_folder import RunFolder
from hypermoe_ds.data.datasets import build_datasets, check_sources
from hypermoe_ds.data.loader import build_loader, validation_batches
from hypermoe_ds.monitor.console import Console
from hypermoe_ds.monitor.logger import MetricLogger
from hypermoe_ds.training.agreement import check_same_settings
from hypermoe_ds.training.changes import record_launch
from hypermoe_ds.training.engine import build_engine, start_ranks
from hypermoe_ds.training.evaluation import Evaluation, evaluate
from hypermoe_ds.training.guard import Guard
from hypermoe_ds.training.loop import train
from hypermoe_ds.training.recorder import Recorder
from hypermoe_ds.training.state import TrainState
from hypermoe_ds.training.watchdog import Watchdog


def main(config: RunConfig, ds_json: dict[str, Any]) -> None:
    """Check everything else, build the parts, hand them to the loop."""
    model = config.architecture()
    check_sources(config.data, model.vocab_size)
    folder = RunFolder(Path(config.run.dir))
    folder.check_same_run(model, Path(config.data.tokenizer))

    rank, world_size = start_ranks(config.train.collective_timeout)
    settings = config.model_dump(mode="json")
    check_same_settings(settings, ds_json)
    ds_config = merge(ds_json, config.train, model, config.parallel.expert, world_size)
    watchdog = Watchdog(folder.watch, rank, world_size, config.train.collective_timeout)
    with claimed(folder.path), watchdog.watching():
        engine = build_engine(model, ds_config, config.optimizer, config.schedule, config.train, config.parallel)
        checkpoints = CheckpointManager(engine, folder.checkpoints, config.checkpoint, settings)
        checkpoints.check_room()
        state = TrainState.from_dict(checkpoints.resume() or {})
        console, logger = Console(rank), MetricLogger(config.monitor, folder.path, rank, state.step)
        console.log(config.opening_line(world_size, state.step))
        if rank == 0:
            record_launch(folder, settings, ds_config, model, state.step, console.log)
        seed, samples, micro_batch = config.train.seed, config.samples(state), config.train.micro_batch_size
        train_set, valid_set = build_datasets(config.data, seed, samples, config.evaluation.max_samples)
        if state.follow(train_set.order_key):
            console.log("warning: data or train.steps changed the order of the samples: some come again, some never")

        def validate() -> Evaluation:
            engine.eval()
            batches = validation_batches(valid_set, micro_batch, rank, world_size)  # type: ignore[arg-type]
            result = evaluate(engine, watchdog.each(batches, "validating"), engine.device)
            engine.train()
            return result

        place = (micro_batch, rank, world_size, state.consumed_samples)
        loader = build_loader(train_set, *place, config.data.workers, config.left_out)
        stopped = train(
            engine=engine,
            batches=watchdog.each(loader, "forward and backward"),
            state=state,
            last_step=config.last_step,
            recorder=Recorder(logger, console, config.monitor.interval, config.train.steps, model.num_experts),
            checkpoints=checkpoints,
            validate=validate if valid_set is not None else None,
            validation_interval=config.evaluation.interval,
            guard=Guard(engine, config.train, config.parallel.expert, console.log, checkpoints, train_set.origin),
            watchdog=watchdog,
        )
        engine.destroy()
    torch.distributed.destroy_process_group()
    sys.exit(EXIT_SAVED if stopped else 0)


if __name__ == "__main__":
    with one_line_errors():
        main(recipe, deepspeed_json)
