"""Define the metrics of a run: name, unit, page and meaning, which values are bad, and the remedy."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple

Page = Literal["loss", "validation", "optimization", "speed", "memory", "data", "routing", "hyper_experts"]
By = Literal["layer", "dataset", "parameters", "part"]

PAGES: Mapping[Page, str] = MappingProxyType(
    {
        "loss": "Loss",
        "validation": "Validation",
        "optimization": "Optimization",
        "speed": "Speed",
        "memory": "Memory",
        "data": "Data",
        "routing": "Routing",
        "hyper_experts": "HyperExperts",
    }
)
PARAMETER_GROUPS = ("experts", "hypernetwork", "routers", "rest")
STEP_PARTS = ("data", "forward", "backward", "optimizer", "checkpoint", "other")


class Metric(NamedTuple):
    """One metric.

    Attributes:
        name: key in metrics.jsonl; with `by`, one key per item: `NAME/moe_layer_0`, `NAME/DATASET`, `NAME/experts`.
        unit: unit of the value; "" for a ratio.
        page: page of the dashboards that shows the metric.
        meaning: what the metric measures.
        bad: when a value is bad, as the end of "bad if it ..."; "" if no value is bad.
        remedy: what to do about a bad value.
        by: kind of the items that have their own value: MoE layer, dataset, group of parameters or part of a step.
        total: whether there is also a value over all items, under `name`.
    """

    name: str
    unit: str
    page: Page
    meaning: str
    bad: str = ""
    remedy: str = ""
    by: By | None = None
    total: bool = True


METRICS: tuple[Metric, ...] = (
    Metric(
        "loss",
        "nats/token",
        "loss",
        "cross-entropy of the training tokens, mean over all steps since the last logged step",
        "rises for hundreds of steps, or is null (NaN)",
        "lower optimizer.lr, lengthen schedule.warmup_steps, or skip the samples that a warning names",
    ),
    Metric("total_loss", "nats/token", "loss", "the training objective: loss plus the weighted routing losses"),
    Metric(
        "aux_loss",
        "",
        "routing",
        "load-balancing loss, mean over MoE layers; 1 for an even load",
        "stays above 1.5",
        "raise model.router_aux_loss_coef",
    ),
    Metric(
        "z_loss",
        "",
        "routing",
        "router z-loss: mean square of the log-sum-exp of the router logits",
        "keeps growing",
        "raise model.z_loss_coef",
    ),
    Metric(
        "valid_loss",
        "nats/token",
        "validation",
        "cross-entropy of the validation tokens, by dataset and as the mean over the tokens of all datasets",
        "rises while the training loss falls",
        "the data repeats: check epochs and add data",
        by="dataset",
    ),
    Metric("valid_perplexity", "", "validation", "exp(valid_loss)", by="dataset"),
    Metric(
        "valid_bits_per_byte",
        "bits/byte",
        "validation",
        "valid_loss / ln 2 * tokens per byte of text (The Pile, arXiv 2101.00027): comparable across tokenizers",
        by="dataset",
    ),
    Metric("lr", "", "optimization", "learning rate of the step"),
    Metric(
        "grad_norm",
        "",
        "optimization",
        "L2 norm of the gradient before clipping, in total and by group of parameters",
        "stays far above train.clip_grad_norm, or is dominated by one group",
        "lower optimizer.lr or lengthen the warm-up",
        by="parameters",
    ),
    Metric("parameter_norm", "", "optimization", "L2 norm of the fp32 weights", by="parameters", total=False),
    Metric(
        "update_ratio",
        "",
        "optimization",
        "L2 norm of the last update / L2 norm of the weights",
        "is above 1e-2 or below 1e-5 after the warm-up",
        "lower or raise optimizer.lr",
        by="parameters",
        total=False,
    ),
    Metric(
        "loss_scale",
        "",
        "optimization",
        "factor that scales the loss in fp16; missing in bf16 and fp32",
        "falls below 1",
        "use train.precision=bf16",
    ),
    Metric(
        "skipped_steps",
        "steps",
        "optimization",
        "number of steps of this run that were skipped because of NaN or Inf",
        "grows, except during the first steps in fp16",
        "set train.skip_samples to the samples that the warnings name",
    ),
    Metric(
        "tokens_per_second",
        "tokens/s",
        "speed",
        "training tokens per second over all ranks since the last logged step, without time for validation and "
        "checkpoints",
        "falls",
        "check which part of step_seconds has grown",
    ),
    Metric("tokens_per_second_per_gpu", "tokens/s", "speed", "tokens_per_second / ranks"),
    Metric(
        "tflops_per_gpu",
        "TFLOP/s",
        "speed",
        "model FLOP/s per GPU, counted for active parameters and without recomputation (docs/METHOD.md)",
    ),
    Metric(
        "mfu",
        "",
        "speed",
        "model FLOPs utilisation: tflops_per_gpu / peak of the GPU (PaLM, arXiv 2204.02311); missing on CPU",
        "is far below that of other runs of the same model on the same GPUs",
        "raise train.micro_batch_size; check step_seconds",
    ),
    Metric(
        "step_seconds",
        "s",
        "speed",
        "mean wall time of a step since the last logged step, without validation, in total and by part",
        "has a `data` or `checkpoint` part of more than a few percent",
        "raise data.workers or checkpoint.interval",
        by="part",
    ),
    Metric(
        "memory_allocated_gib",
        "GiB",
        "memory",
        "peak GPU memory allocated for tensors since the last logged step, maximum over ranks",
    ),
    Metric(
        "memory_reserved_gib",
        "GiB",
        "memory",
        "peak GPU memory reserved by PyTorch's allocator since the last logged step, maximum over ranks",
        "is far above memory_allocated_gib (fragmentation)",
        "set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True",
    ),
    Metric(
        "peak_memory_gib",
        "GiB",
        "memory",
        "peak memory since the launch, maximum over ranks: memory allocated for tensors on a GPU, or resident memory "
        "on CPU",
    ),
    Metric(
        "consumed_samples",
        "samples",
        "data",
        "number of training samples consumed, including samples skipped by train.skip_samples",
    ),
    Metric(
        "consumed_tokens",
        "tokens",
        "data",
        "number of tokens consumed, including those of steps skipped because of NaN or Inf, in total and by dataset",
        by="dataset",
    ),
    Metric(
        "epochs",
        "epochs",
        "data",
        "consumed_tokens / tokens of the dataset",
        "is above 4, because more repetitions help little (arXiv 2305.16264)",
        "add data, or lower the dataset's weight",
        by="dataset",
        total=False,
    ),
    Metric(
        "expert_load",
        "",
        "routing",
        "share of a layer's routed tokens that each expert received, as a list with one number per expert",
        by="layer",
        total=False,
    ),
    Metric(
        "expert_load_max_over_mean",
        "",
        "routing",
        "load of the busiest expert / mean load; 1 for an even load",
        "is above 3 after the first thousand steps",
        "raise model.router_aux_loss_coef",
        by="layer",
        total=False,
    ),
    Metric(
        "expert_load_min_over_mean",
        "",
        "routing",
        "load of the least busy expert / mean load",
        "is near 0 after the first thousand steps",
        "raise model.router_aux_loss_coef",
        by="layer",
        total=False,
    ),
    Metric(
        "experts_without_tokens",
        "experts",
        "routing",
        "number of experts that received no tokens in the step",
        "is above 0 after the first thousand steps",
        "raise model.router_aux_loss_coef",
        by="layer",
        total=False,
    ),
    Metric(
        "router_entropy",
        "nats",
        "routing",
        "entropy of the router's probabilities, mean over tokens; at most ln N for N experts",
        "is near 0 early in training (the router has collapsed), or near ln N late in training (it is undecided)",
        "near 0: raise model.z_loss_coef; near ln N: lower model.router_aux_loss_coef",
        by="layer",
        total=False,
    ),
    Metric(
        "distinct_selections",
        "selections",
        "routing",
        "number of distinct sets of selected experts in a micro-batch, mean over micro-batches and ranks",
        by="layer",
        total=False,
    ),
    Metric(
        "hyper_expert_norm_ratio",
        "",
        "hyper_experts",
        "L2 norm of the HyperExperts' output / L2 norm of the experts' output",
        "stays near 0",
        "check hyper_expert_contribution; raise optimizer.lr or model.bottleneck_size",
        by="layer",
        total=False,
    ),
    Metric(
        "hyper_expert_similarity",
        "",
        "hyper_experts",
        "mean cosine similarity between the generated weights of a sample of selections",
        "stays at 1, which means that the hypernetwork ignores the selection",
        "raise model.expert_embedding_size or model.selection_hidden_size",
        by="layer",
        total=False,
    ),
    Metric(
        "valid_loss_without_hyper_experts",
        "nats/token",
        "hyper_experts",
        "valid_loss of the same weights with the HyperExperts disabled",
        by="dataset",
    ),
    Metric(
        "hyper_expert_contribution",
        "nats/token",
        "hyper_experts",
        "valid_loss_without_hyper_experts - valid_loss: by how much the HyperExperts lower the loss",
        "is 0 or below after the warm-up",
        "check hyper_expert_norm_ratio and hyper_expert_similarity",
        by="dataset",
    ),
)

_ITEMS: Mapping[By, str] = MappingProxyType(
    {"layer": "moe_layer_I", "dataset": "DATASET", "parameters": "GROUP", "part": "PART"}
)
_BY_NAME = MappingProxyType({metric.name: metric for metric in METRICS})


def metric_of(key: str) -> Metric | None:
    """Return the metric of a key in metrics.jsonl, such as `router_entropy/moe_layer_3`; None if it is unknown."""
    return _BY_NAME.get(key.partition("/")[0])


def metrics_tables() -> str:
    """Return all metrics in Markdown, with a heading and a table per page."""
    return "\n".join(_table(page, title) for page, title in PAGES.items())


def _table(page: Page, title: str) -> str:
    rows = ["| key | unit | meaning | bad if it | then |", "| --- | --- | --- | --- | --- |"]
    rows += [
        f"| {_keys(metric)} | {metric.unit} | {metric.meaning} | {metric.bad} | {metric.remedy} |"
        for metric in METRICS
        if metric.page == page
    ]
    return f"## {title}\n\n" + "\n".join(rows) + "\n"


def _keys(metric: Metric) -> str:
    keys = [metric.name] * (metric.total or not metric.by)
    if metric.by:
        keys.append(f"{metric.name}/{_ITEMS[metric.by]}")
    return ", ".join(f"`{key}`" for key in keys)
