"""Describe a launch as a table for the console."""

from collections.abc import Iterator, Sequence

from hypermoe_ds.data.settings import DataConfig
from hypermoe_ds.data.shares import DatasetShare
from hypermoe_ds.modeling import HyperMoEConfig
from hypermoe_ds.monitor.units import counted, readable
from hypermoe_ds.parallel.topology import ParallelConfig, gradient_accumulation_steps
from hypermoe_ds.training.launches import Launch
from hypermoe_ds.training.settings import TrainConfig

# Repeating data for up to 4 epochs lowers the loss almost as much as new data (Muennighoff et al., arXiv 2305.16264).
_MOST_EPOCHS = 4


def banner(
    launch: Launch,
    model: HyperMoEConfig,
    train: TrainConfig,
    data: DataConfig,
    parallel: ParallelConfig,
    zero_stage: int,
    run_dir: str,
) -> list[tuple[str, str]]:
    """Return the rows of the table, each as a name and a text.

    Args:
        launch: the launch.
        model: configuration of the model.
        train: training settings.
        data: data settings.
        parallel: parallelism settings.
        zero_stage: ZeRO stage.
        run_dir: the run folder.
    """
    counts = launch.parameters
    ranks, batch, length = launch.world_size, train.global_batch_size, data.sequence_length
    accumulation = gradient_accumulation_steps(batch, train.micro_batch_size, ranks)
    beginning = f"resumed from step {launch.step:,}" if launch.step else "new run"
    return [
        (
            "model",
            f"{readable(counts['total'])} parameters, {readable(counts['active'])} active, "
            f"{readable(counts['hypernetwork'])} in the hypernetwork; vocabulary {model.vocab_size:,}",
        ),
        (
            "layout",
            f"{counted(ranks, 'rank')} on {counted(launch.hosts, 'host')}; expert parallel {parallel.expert}, "
            f"data parallel {ranks}; ZeRO {zero_stage}; {train.precision}",
        ),
        (
            "batch",
            f"micro {train.micro_batch_size} x {counted(ranks, 'rank')} x {accumulation} accumulated = global "
            f"{counted(batch, 'sequence')} of {length:,} tokens; {batch * length:,} tokens per step",
        ),
        *zip(["data", *[""] * len(launch.datasets)], _datasets(launch.datasets), strict=False),
        ("length", f"{counted(train.steps, 'step')}, {readable(train.steps * batch * length)} tokens"),
        ("device", launch.device),
        ("run", f"{run_dir}; {beginning}"),
    ]


def _datasets(datasets: Sequence[DatasetShare]) -> Iterator[str]:
    longest = max(len(dataset.name) for dataset in datasets)
    for dataset in datasets:
        tokens, times = readable(dataset.tokens), f"{dataset.epochs:.2f}"
        yield f"{dataset.name:<{longest}}  {tokens:>6} tokens  {dataset.weight:6.1%}  {times:>7} epochs by the end"


def repetition_warnings(datasets: Sequence[DatasetShare]) -> list[str]:
    """Return a warning for each dataset that the run reads for 4 or more epochs."""
    return [
        f"warning: the run reads {dataset.name} {dataset.epochs:.1f} times ({readable(dataset.tokens)} tokens): "
        "after 4 epochs, repeated data helps little; add data, lower its weight in data.train, or shorten the run"
        for dataset in datasets
        if dataset.epochs >= _MOST_EPOCHS
    ]
