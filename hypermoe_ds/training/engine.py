"""The one place where DeepSpeed is started and given the model."""

import io
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from datetime import timedelta
from functools import partial
from importlib import import_module
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.constants import TORCH_DISTRIBUTED_DEFAULT_PORT
from deepspeed.git_version_info import installed_ops
from deepspeed.moe.ep_router import TokenChoiceTopKRouter
from deepspeed.moe.utils import configure_moe_param_groups
from torch import Tensor
from torch.optim import Optimizer

from hypermoe_ds.errors import MachineError, UserError
from hypermoe_ds.modeling import HyperMoEConfig, HyperMoEForCausalLM
from hypermoe_ds.modeling.moe import Fp32Gate
from hypermoe_ds.parallel.expert_parallel import sum_over_ranks
from hypermoe_ds.parallel.overlap import overlap_hyper_experts
from hypermoe_ds.parallel.topology import ParallelConfig
from hypermoe_ds.process import export_rank_variables, local_rank, signal_when_parent_ends
from hypermoe_ds.training.operators import operators_folder, without_stale_locks
from hypermoe_ds.training.optimizer import build_schedule, parameter_groups
from hypermoe_ds.training.settings import OptimizerConfig, ScheduleConfig, TrainConfig

_LOGGER = logging.getLogger(__name__)


def start_ranks(timeout: float = 1800, log_level: str = "ERROR") -> tuple[int, int]:
    """Join the process group that the launcher describes (NCCL with GPUs, gloo without).

    Launchers are deepspeed, torchrun, srun and mpirun; where none names MASTER_ADDR, mpi4py finds the ranks. From now
    on SIGTERM comes to this rank when its launcher ends.

    Args:
        timeout: seconds to wait for ranks that do not come, and for each collective.
        log_level: level from which on DeepSpeed logs.

    Returns:
        This rank and the number of ranks.

    Raises:
        UserError: the launcher's port is taken; mpi4py is needed and missing, or does not see the launcher's ranks.
        MachineError: the ranks do not meet at the launcher's address.
    """
    signal_when_parent_ends(signal.SIGTERM)
    _set_up_libraries(log_level)
    export_rank_variables()
    launched = os.environ.get("WORLD_SIZE")
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
        raise UserError("mpi4py", f"must find the ranks, for no launcher named MASTER_ADDR ({error})", remedy) from None
    except (torch.distributed.DistNetworkError, torch.distributed.DistStoreError) as error:
        port = f"port {os.environ.get('MASTER_PORT')} of {os.environ.get('MASTER_ADDR')}"
        problem = f"the ranks cannot meet there ({str(error).splitlines()[0][:120]})"
        if "EADDRINUSE" in str(error):
            remedy = "another job may hold it: give `deepspeed --master_port N` a free one"
            raise UserError(port, problem, remedy) from None
        raise MachineError(f"{port}: {problem}; see which host is missing: python tools/preflight.py") from None
    found = torch.distributed.get_world_size()
    if launched is not None and found != int(launched):
        remedy = "set MASTER_ADDR, or make the launcher and the library that mpi4py loads those of one MPI"
        raise UserError("mpi4py", f"sees {found} of the {launched} ranks of the launcher", remedy)
    return torch.distributed.get_rank(), found


def _set_up_libraries(log_level: str) -> None:
    """Before their first use; what the environment says already goes before."""
    logging.getLogger("DeepSpeed").setLevel(log_level)
    if os.access(sys.prefix, os.W_OK):
        # Each environment keeps the operators it compiled: in the user's one cache two of them rebuild in turn.
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", f"{sys.prefix}/torch_extensions")
    # On CPU the code of a bf16 product, up to 0.7 MiB, is kept for each number of rows: 1,024 by oneDNN, as many by
    # PyTorch. Experts have other numbers of rows in every step; 128 hold what each layer and the next have in common.
    for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(cache, "128")
    # DeepSpeed 0.19.8 calls it on every rank and step; torch 2.13 says each time that it has a new name.
    warnings.filterwarnings("ignore", ".*(all_gather_into|reduce_scatter)_tensor.*", FutureWarning)


def _load_communication() -> None:
    """Load the operator that DeepSpeed's process groups use on CPU, before ranks wait for each other."""
    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is not None and deepspeed.ops.__compatible_ops__.get(builder.NAME, False):
        with without_stale_locks():
            builder.load()


def build_engine(
    config: HyperMoEConfig,
    ds_config: dict[str, Any],
    optimizer: OptimizerConfig,
    schedule: ScheduleConfig,
    train: TrainConfig,
    parallel: ParallelConfig,
) -> deepspeed.DeepSpeedEngine:
    """Build the model on every rank alike and hand it to DeepSpeed.

    Every rank draws the whole model from the same seed, and expert parallelism then keeps each
    rank's experts: so the model is the same whatever the layout is.

    Raises:
        UserError: the device does not compute in `train.precision`.
    """
    if train.precision == "fp16" and not get_accelerator().is_fp16_supported():
        raise UserError("train.precision=fp16", "this device does not compute in it", "set it to bf16 or fp32")
    torch.manual_seed(train.seed)
    model = HyperMoEForCausalLM(config)
    if config.router_aux_loss_scope == "data_parallel":
        model.sum_over_ranks = sum_over_ranks
    model.lm_head.fused_cross_entropy = fused_cross_entropy()
    if train.activation_checkpointing:
        model.activation_checkpointing_enable()
    offload = ds_config.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none") != "none"
    with redirect_stdout(io.StringIO()):  # BF16_Optimizer prints the memory in use, some 25 lines
        engine, *_ = deepspeed.initialize(
            model=model,
            model_parameters=parameter_groups(model, optimizer.weight_decay),
            optimizer=lambda groups: _adamw(configure_moe_param_groups(groups), optimizer, offload),
            lr_scheduler=lambda basic: build_schedule(basic, schedule, train.steps),
            config=ds_config,
        )
    if config.router_dtype == "fp32":
        _compute_router_in_fp32(model)
    overlap_hyper_experts(model, parallel.overlap_hyper_experts)
    return engine


def _compute_router_in_fp32(model: HyperMoEForCausalLM) -> None:
    """Have AutoEP's routers compute as the model's own; their gates keep parameters, names and DeepSpeed's hooks."""
    for module in model.modules():
        if isinstance(module, TokenChoiceTopKRouter):
            module.gate.__class__ = Fp32Gate


def fused_cross_entropy() -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    """The output projection's loss by liger-kernel, where it is installed and there is a GPU.

    Expected of `liger_fused_linear_cross_entropy(input, weight, target, ...)`, as of 0.8: the sum in fp32 over the
    targets that are not -100 (its default), gradients to input and weight, the weight's added up in `accum_dtype`.
    """
    if not torch.cuda.is_available():
        return None
    try:
        liger = import_module("liger_kernel.transformers.functional")
    except ImportError:
        return None
    return partial(liger.liger_fused_linear_cross_entropy, reduction="sum", accum_dtype=torch.float32)


def _adamw(groups: list[dict[str, Any]], settings: OptimizerConfig, offload: bool) -> Optimizer:
    """Fused AdamW on the device, or DeepSpeed's where the optimizer's state lives in host memory."""
    arguments: dict[str, Any] = {"lr": settings.lr, "betas": (settings.beta1, settings.beta2), "eps": settings.eps}
    if offload:
        _announce_compilation("cpu_adam", "DeepSpeed's Adam for the host")
        with without_stale_locks():
            on_host: Optimizer = deepspeed.ops.adam.DeepSpeedCPUAdam(groups, **arguments)
        return on_host
    return torch.optim.AdamW(groups, fused=True, **arguments)


def _announce_compilation(operator: str, name: str) -> None:
    """Log a line where DeepSpeed is about to compile an operator, for it prints none."""
    folder = operators_folder()
    if not installed_ops.get(operator, False) and not any(folder.rglob(f"{operator}.so")):
        _LOGGER.info("compiling %s, once for this environment: one to five minutes, in %s", name, folder)
