"""Run a training job: build its components, run the training loop, and report the launch and its result."""

import os
import socket
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hypermoe_ds.checkpoint.lock import run_lock
from hypermoe_ds.checkpoint.manager import CheckpointManager
from hypermoe_ds.checkpoint.run_folder import RunFolder
from hypermoe_ds.data.consumption import Consumption
from hypermoe_ds.data.dataset_checks import check_datasets
from hypermoe_ds.data.loader import build_loader
from hypermoe_ds.data.settings import DataConfig
from hypermoe_ds.data.token_files import read_metadata
from hypermoe_ds.data.tokenizer import load_tokenizer
from hypermoe_ds.data.training_set import TrainingSet, build_training_set
from hypermoe_ds.data.validation_set import build_validation_sets
from hypermoe_ds.device import uses_gpu
from hypermoe_ds.errors import EXIT_SAVED, UserError
from hypermoe_ds.modeling import HyperMoEConfig
from hypermoe_ds.monitor.console import Console
from hypermoe_ds.monitor.flops import ModelFlops, peak_tflops, training_flops_per_token
from hypermoe_ds.monitor.logger import MetricLogger
from hypermoe_ds.monitor.output_streams import OutputStreams
from hypermoe_ds.parallel.control_group import ControlGroup
from hypermoe_ds.parallel.topology import check_widths_on_gpu
from hypermoe_ds.provenance import versions_now
from hypermoe_ds.resilience.watchdog import Watchdog
from hypermoe_ds.run_config import RunConfig
from hypermoe_ds.training import loop
from hypermoe_ds.training.banner import banner, repetition_warnings
from hypermoe_ds.training.changes import record_launch
from hypermoe_ds.training.ds_config import merge
from hypermoe_ds.training.engine import build_engine, start_ranks
from hypermoe_ds.training.launches import Ended, Launch, write_end
from hypermoe_ds.training.norms import ParameterNorms
from hypermoe_ds.training.outcome import outcome_rows, resume_command
from hypermoe_ds.training.profiling import Profiler
from hypermoe_ds.training.recorder import Recorder
from hypermoe_ds.training.same_settings import check_same_settings
from hypermoe_ds.training.state import TrainState
from hypermoe_ds.training.step_monitor import StepMonitor
from hypermoe_ds.training.validation import Batches, Validator


def train(config: RunConfig, ds_json: dict[str, Any], streams: OutputStreams, console: Console) -> int:
    """Check everything that needs torch or other ranks, build the components, train, and return the exit code.

    Raises:
        UserError: the recipe, the DeepSpeed JSON, the data, the run folder or the number of ranks are inconsistent.
        MachineError: the ranks cannot connect, or a disk fails.
    """
    began = time.monotonic()
    model_config, folder = config.build_model_config(), RunFolder(Path(config.run.dir))
    if uses_gpu():
        check_widths_on_gpu(model_config.hidden_size, model_config.moe_intermediate_size, config.train.precision)
    check_datasets(config.data, model_config.vocab_size)
    folder.check_same_run(model_config, Path(config.data.tokenizer))
    settings = config.model_dump(mode="json")
    with console.phase("waiting for all ranks"):
        rank, world_size = start_ranks(config.train.collective_timeout, streams.level)
        ranks = ControlGroup()
        check_same_settings(settings, ds_json, ranks)
    ds_config = merge(ds_json, config.train, model_config, config.parallel.expert, world_size)
    show = partial(console.progress, config.train.steps)
    watchdog = Watchdog(folder.watch, rank, world_size, config.train.collective_timeout, streams.err, show)
    with run_lock(folder.path, ranks), watchdog.watching():
        with console.phase("building the model"):
            sections = config.optimizer, config.schedule, config.train, config.parallel
            engine = build_engine(model_config, ds_config, *sections, document_mask=config.data.document_mask)
        checkpoints = CheckpointManager(engine, folder.checkpoints, config.checkpoint, settings)
        checkpoints.check_room()
        with console.phase("loading the newest checkpoint"):
            state = TrainState.from_dict(checkpoints.resume() or {})
        logger = MetricLogger(config.monitor, folder.path, rank, state.step)
        train_set = load_training_set(config, state)
        launch = report_launch(config, model_config, ds_config, state, train_set, folder, ranks, console)
        if rank == 0:  # not on every rank, because `versions_now` starts a git process
            logger.log_launch(settings, versions_now())
        validator = build_validator(config, engine, watchdog) if config.data.valid else None
        recorder = build_recorder(config, model_config, engine, train_set, logger, console)
        batches = training_batches(config, train_set, state.consumed_samples, model_config.vocab_size)
        stopped = loop.train(
            engine=engine,
            batches=watchdog.each(batches, "forward and backward"),
            state=state,
            last_step=config.last_step,
            recorder=recorder,
            checkpoints=checkpoints,
            validate=validator,
            validation_interval=config.evaluation.interval,
            skipped_samples=config.skipped_samples,
            stage_start=train_set.stage_start,
            step_monitor=StepMonitor(
                engine, config.train, config.parallel.expert, ranks, console.log, checkpoints, train_set.describe_sample
            ),
            watchdog=watchdog,
        )
        engine.destroy()
        if rank == 0:
            report_end(config, launch, state, train_set, stopped, time.monotonic() - began, console)
    torch.distributed.destroy_process_group()
    return EXIT_SAVED if stopped else 0


def load_training_set(config: RunConfig, state: TrainState) -> TrainingSet:
    """Build the training set of the run. The order of its samples continues the order in the checkpoint.

    Raises:
        UserError: see `build_training_set`; also raised if a range of `train.skip_samples` begins or ends within a
            sample.
    """
    samples = config.samples(state)
    train_set = build_training_set(config.data, config.train.seed, config.stages(state), samples, state.data_stage)
    train_set.check_skipped(config.train.skip_samples)
    return train_set


def training_batches(config: RunConfig, train_set: TrainingSet, consumed_samples: int, vocab_size: int) -> Batches:
    """Load this rank's micro-batches, starting at `consumed_samples`."""
    return build_loader(
        train_set,
        micro_batch_size=config.train.micro_batch_size,
        rank=torch.distributed.get_rank(),
        size=torch.distributed.get_world_size(),
        consumed_samples=consumed_samples,
        workers=config.data.workers,
        vocab_size=vocab_size,
        document_end=document_end(config.data),
        skipped_samples=config.skipped_samples,
    )


def document_end(data: DataConfig) -> int | None:
    """Return the id of the token that ends each document, or None if documents are not masked."""
    return int(load_tokenizer(data.tokenizer).eos_token_id) if data.document_mask else None


def build_recorder(
    config: RunConfig,
    model_config: HyperMoEConfig,
    engine: Any,
    train_set: TrainingSet,
    logger: MetricLogger,
    console: Console,
) -> Recorder:
    """Build the recorder of training steps.

    Raises:
        UserError: a rank in `monitor.profile_ranks` does not exist.
    """
    device = torch.cuda.get_device_name() if uses_gpu() else None
    known = peak_tflops(device, config.train.precision) if device is not None else None
    flops = ModelFlops(
        per_token=lambda sample: training_flops_per_token(model_config, train_set.stage_start(sample).sequence_length),
        ranks=torch.distributed.get_world_size(),
        device=device,
        peak=config.monitor.peak_tflops or known,
    )
    rank = torch.distributed.get_rank()
    consumption = None
    if rank == 0:
        consumption = Consumption(train_set, config.skipped_samples)
    norms = ParameterNorms(engine, config.optimizer)
    for absent in (number for number in config.monitor.profile_ranks if number >= flops.ranks):
        remedy = f"give ranks from 0 to {flops.ranks - 1}"
        raise UserError(f"monitor.profile_ranks={config.monitor.profile_ranks}", f"there is no rank {absent}", remedy)
    profiler = Profiler(config.monitor, Path(config.run.dir) / "profile", rank, engine.module, console.log)
    return Recorder(engine, config.monitor, config.train.steps, logger, console, flops, norms, consumption, profiler)


def build_validator(config: RunConfig, engine: Any, watchdog: Watchdog) -> Validator:
    """Build the validation sets and the validator.

    Raises:
        UserError: a prompt is empty or too long, or a token file is missing or damaged.
    """
    datasets = build_validation_sets(config.data.valid, config.data.sequence_length, config.evaluation.max_samples)
    named = zip(datasets, (read_metadata(dataset.prefix) for dataset in config.data.valid), strict=True)
    bytes_per_token = {name: metadata.bytes_per_token for name, metadata in named if metadata is not None}

    def each(batches: Batches, total: int) -> Batches:
        return watchdog.each(batches, "validating", total)

    tokenizer, micro_batch = load_tokenizer(config.data.tokenizer), config.train.micro_batch_size
    end = document_end(config.data)
    return Validator(engine, datasets, bytes_per_token, config.evaluation, tokenizer, micro_batch, end, each)


def report_launch(
    config: RunConfig,
    model_config: HyperMoEConfig,
    ds_config: dict[str, Any],
    state: TrainState,
    train_set: TrainingSet,
    folder: RunFolder,
    ranks: ControlGroup,
    console: Console,
) -> Launch:
    """Print a summary of the launch and the settings that changed, and write both to the run folder (collective).

    Raises:
        MachineError: a file cannot be written.
    """
    hosts = len(set(ranks.gather(socket.gethostname())))
    datasets = train_set.shares()
    launch = Launch(state.step, ranks.size, hosts, asdict(model_config.parameter_counts()), datasets)
    if ranks.rank == 0:
        stage = ds_config["zero_optimization"]["stage"]
        console.table(banner(launch, model_config, config.train, config.data, config.parallel, stage, config.run.dir))
        for warning in repetition_warnings(datasets):
            console.log(warning)
        record_launch(folder, config.model_dump(mode="json"), ds_config, model_config, state.step, console.log)
        launch.write(folder.path)
        if state.step >= config.last_step:
            console.log("nothing to train: raise train.steps or train.stop_at_step to continue")
    return launch


def report_end(
    config: RunConfig,
    launch: Launch,
    state: TrainState,
    train_set: TrainingSet,
    stopped: bool,
    seconds: float,
    console: Console,
) -> None:
    """Print the result of the launch and the commands to run next, and record in the run folder why the launch ended.

    Raises:
        MachineError: the file cannot be written.
    """
    ended: Ended = "signal" if stopped else "finished" if state.step >= config.train.steps else "stop_at_step"
    run_dir, tokens = Path(config.run.dir), sum(train_set.tokens_before(state.consumed_samples).values())
    write_end(run_dir, state.step, ended)
    data = next((dataset.prefix for dataset in config.data.valid), None)
    resume = resume_command(launch.world_size, launch.hosts, sys.argv, ended, os.environ)
    console.table(outcome_rows(run_dir, ended, state.step, tokens, seconds, data, resume), wrap=False)
