"""Start the process group and build the DeepSpeed engine."""

import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from importlib import import_module
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.constants import TORCH_DISTRIBUTED_DEFAULT_PORT
from deepspeed.git_version_info import installed_ops
from deepspeed.moe.utils import configure_moe_param_groups
from torch import Tensor
from torch.optim import Optimizer

from hypermoe_ds.device import uses_gpu
from hypermoe_ds.errors import MachineError, UserError
from hypermoe_ds.modeling import HyperMoEConfig, HyperMoEForCausalLM
from hypermoe_ds.parallel.parallelize import parallelize
from hypermoe_ds.parallel.topology import ParallelConfig
from hypermoe_ds.process import allow_open_files, export_rank_variables, local_rank, signal_when_parent_ends
from hypermoe_ds.training.document_attention import PER_DOCUMENT
from hypermoe_ds.training.operators import operators_folder, without_stale_locks
from hypermoe_ds.training.optimizer import build_schedule, parameter_groups
from hypermoe_ds.training.settings import OptimizerConfig, ScheduleConfig, TrainConfig

_LOGGER = logging.getLogger(__name__)


def start_ranks(timeout: float = 1800, log_level: str = "ERROR") -> tuple[int, int]:
    """Join the process group that the launcher describes (NCCL with GPUs, gloo without).

    The launcher may be deepspeed, torchrun, srun or mpirun. If MASTER_ADDR is not set, DeepSpeed finds the ranks with
    mpi4py. After this call, this rank receives SIGTERM when its launcher ends.

    Args:
        timeout: seconds to wait for missing ranks and for each collective operation.
        log_level: log level of DeepSpeed.

    Returns:
        The rank of this process and the number of ranks.

    Raises:
        UserError: the launcher's port is in use, or mpi4py is needed but missing or does not find the launcher's ranks.
        MachineError: the ranks cannot connect to the launcher's address.
    """
    signal_when_parent_ends(signal.SIGTERM)
    _set_up_libraries(log_level)
    export_rank_variables()
    launched = os.environ.get("WORLD_SIZE")
    # The control group and checkpoints use gloo. Without GPUs, so do the default group and DeepSpeed's group.
    allow_open_files(int(launched or "1"), gloo_groups=2 if uses_gpu() else 4)
    get_accelerator().set_device(local_rank())
    _load_communication()
    try:
        deepspeed.init_distributed(
            dist_backend=get_accelerator().communication_backend_name(),
            distributed_port=int(os.environ.get("MASTER_PORT", str(TORCH_DISTRIBUTED_DEFAULT_PORT))),
            timeout=timedelta(seconds=timeout),
        )
    except ImportError as error:
        remedy = "bash launch/setup.sh mpi, or set MASTER_ADDR and MASTER_PORT"
        raise UserError(
            "mpi4py", f"is needed to find the ranks, because no launcher set MASTER_ADDR ({error})", remedy
        ) from None
    except (torch.distributed.DistNetworkError, torch.distributed.DistStoreError) as error:
        port = f"port {os.environ.get('MASTER_PORT')} of {os.environ.get('MASTER_ADDR')}"
        problem = f"the ranks cannot connect to it ({str(error).splitlines()[0][:120]})"
        if "EADDRINUSE" in str(error):
            remedy = "another job may use this port: set MASTER_PORT or `deepspeed --master_port` to a free one"
            raise UserError(port, problem, remedy) from None
        raise MachineError(f"{port}: {problem}; see which host is missing: python tools/preflight.py") from None
    found = torch.distributed.get_world_size()
    if launched is not None and found != int(launched):
        remedy = "set MASTER_ADDR, or launch with the MPI installation that mpi4py loads"
        raise UserError("mpi4py", f"finds only {found} of the launcher's {launched} ranks", remedy)
    return torch.distributed.get_rank(), found


def _set_up_libraries(log_level: str) -> None:
    """Configure libraries before their first use; keep environment variables that are already set."""
    logging.getLogger("DeepSpeed").setLevel(log_level)
    if os.access(sys.prefix, os.W_OK):
        # Each environment caches its compiled operators: with a shared cache, environments would keep rebuilding them.
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", f"{sys.prefix}/torch_extensions")
    # On CPUs, oneDNN and PyTorch each cache kernels for 1,024 bf16 matrix shapes, and an entry takes up to 0.7 MiB. The
    # number of rows per expert changes in every step, so most entries are never reused. 128 entries are enough for the
    # shapes that occur in several layers.
    for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(cache, "128")
    # DeepSpeed 0.19.8 calls these functions in every step, and torch 2.13 warns each time that they were renamed.
    warnings.filterwarnings("ignore", ".*(all_gather_into|reduce_scatter)_tensor.*", FutureWarning)


def _load_communication() -> None:
    """Load DeepSpeed's communication operator for CPUs before ranks connect, because loading may compile it."""
    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is not None and deepspeed.ops.__compatible_ops__.get(builder.NAME, False):
        with without_stale_locks():
            builder.load()


def build_engine(
    model_config: HyperMoEConfig,
    ds_config: dict[str, Any],
    optimizer: OptimizerConfig,
    schedule: ScheduleConfig,
    train: TrainConfig,
    parallel: ParallelConfig,
    document_mask: bool = False,
) -> deepspeed.DeepSpeedEngine:
    """Build the model and the DeepSpeed engine that trains it (collective).

    Every rank initialises the full model with the same seed; expert parallelism then keeps only the rank's own experts.
    The initial weights therefore do not depend on the parallel layout.

    If documents are masked, FlexAttention computes the attention on a GPU, and one call per document on a CPU. With one
    call for all documents, scaled dot-product attention would read a mask of S x S values per sample.

    Raises:
        UserError: the device does not support `train.precision`.
    """
    if train.precision == "fp16" and not get_accelerator().is_fp16_supported():
        raise UserError("train.precision=fp16", "this device does not support it", "set it to bf16 or fp32")
    torch.manual_seed(train.seed)
    model = HyperMoEForCausalLM(model_config)
    model.lm_head.fused_cross_entropy = fused_cross_entropy()
    if document_mask:
        model.set_attn_implementation("flex_attention" if uses_gpu() else PER_DOCUMENT)
    offload = ds_config.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none") != "none"
    return parallelize(
        model,
        ds_config,
        parameter_groups(model, optimizer.weight_decay),
        optimizer=lambda groups: _adamw(configure_moe_param_groups(groups), optimizer, offload),
        scheduler=lambda basic: build_schedule(basic, schedule, train.steps),
        activation_checkpointing=train.activation_checkpointing,
        overlap=parallel.overlap_hyper_experts,
    )


def fused_cross_entropy() -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    """Return liger-kernel's fused linear cross-entropy, or None without liger-kernel or a GPU.

    In liger-kernel 0.8, `liger_fused_linear_cross_entropy(input, weight, target, ...)` returns the fp32 sum over all
    targets except -100 (the default), with gradients for input and weight. The weight's gradient is accumulated in
    `accum_dtype`.
    """
    if not uses_gpu():
        return None
    try:
        liger = import_module("liger_kernel.transformers.functional")
    except ImportError:
        return None
    return partial(liger.liger_fused_linear_cross_entropy, reduction="sum", accum_dtype=torch.float32)


def _adamw(groups: list[dict[str, Any]], settings: OptimizerConfig, offload: bool) -> Optimizer:
    """Build PyTorch's fused AdamW on the device or, with offload, DeepSpeed's AdamW on the host."""
    arguments: dict[str, Any] = {"lr": settings.lr, "betas": (settings.beta1, settings.beta2), "eps": settings.eps}
    if offload:
        _announce_compilation("cpu_adam", "DeepSpeed's Adam for the host")
        with without_stale_locks():
            on_host: Optimizer = deepspeed.ops.adam.DeepSpeedCPUAdam(groups, **arguments)
        return on_host
    return torch.optim.AdamW(groups, fused=True, **arguments)


def _announce_compilation(operator: str, name: str) -> None:
    """Log that DeepSpeed is about to compile an operator, because DeepSpeed itself prints nothing."""
    folder = operators_folder()
    if not installed_ops.get(operator, False) and not any(folder.rglob(f"{operator}.so")):
        _LOGGER.info("compiling %s in %s: takes one to five minutes, once per environment", name, folder)
