"""Build the sides of a comparison: models of the same size, each with its training step.

A training step is a function `step(batch) -> loss` that runs forward, backward, gradient clipping and AdamW. `batch`
contains `input_ids` [B, S] and `labels` [B, S] (the next tokens). All micro-batches of a step use the same batch. The
loss is a tensor in nats per token.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import deepspeed
import torch
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import configure_moe_param_groups
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import MixtralConfig, MixtralForCausalLM

from hypermoe_ds.checkpoint.expert_layout import split_gate_up
from hypermoe_ds.config import LARGEST_COUNT
from hypermoe_ds.device import uses_gpu
from hypermoe_ds.modeling import HyperMoEConfig, HyperMoEForCausalLM
from hypermoe_ds.modeling.moe import SwiGLU
from hypermoe_ds.parallel.topology import ParallelConfig
from hypermoe_ds.training.ds_config import load_deepspeed_json, merge
from hypermoe_ds.training.engine import build_engine, fused_cross_entropy
from hypermoe_ds.training.loop import optimizer_step
from hypermoe_ds.training.optimizer import parameter_groups
from hypermoe_ds.training.settings import OptimizerConfig, ScheduleConfig, TrainConfig
from hypermoe_ds.training.step_observer import StepObserver
from step_settings import StepSettings

Batch = dict[str, Tensor]
Step = Callable[[Batch], Tensor]

_ZERO = Path(__file__).parents[1] / "ds_configs" / "zero1.json"


def build(side: str, settings: StepSettings) -> tuple[nn.Module, Step]:
    """Build one of the compared models on this rank. The process group must exist.

    Args:
        side: one of the names that train_step.py lists.
        settings: the settings of the comparison.

    Returns:
        A training module and its step function.
    """
    config = settings.model_config(side)
    train = TrainConfig(
        steps=LARGEST_COUNT,
        micro_batch_size=settings.micro_batch_size,
        global_batch_size=settings.micro_batch_size * settings.accumulation * settings.ranks,
        precision=settings.precision,  # type: ignore[arg-type] # pydantic checks it
        activation_checkpointing=settings.activation_checkpointing,
        seed=settings.seed,
    )
    optimizer = OptimizerConfig(lr=1e-4 if settings.repeat_batch else 1e-12)
    if side == "mixtral":
        return _mixtral(config, train, optimizer, settings)
    ds_config = merge(load_deepspeed_json(_ZERO), train, config, settings.expert_parallel, settings.ranks)
    if side == "deepspeed_moe":
        engine = _deepspeed_moe(config, ds_config, train, optimizer, settings.expert_parallel)
    else:
        model_class = _plain_moe if side == "moe" else HyperMoEForCausalLM
        with patch("hypermoe_ds.training.engine.HyperMoEForCausalLM", model_class):
            schedule = ScheduleConfig(name="constant")
            engine = build_engine(config, ds_config, optimizer, schedule, train, ParallelConfig())
    if side == "per_token":
        _force_per_token(engine.module)
    return engine.module, _engine_step(engine)


def _plain_moe(model_config: HyperMoEConfig) -> HyperMoEForCausalLM:
    """Build the model without HyperExperts, with the initial weights of HyperMoE.

    With different initial weights, each rank would receive another share of the tokens, which would change the
    step time.
    """
    model = HyperMoEForCausalLM(HyperMoEConfig(**{**model_config.to_dict(), "hypernetwork": True}))
    model.model.hypernetwork = None
    for layer in model.model.layers:
        layer.hyper_experts = None  # type: ignore[assignment]
    model.config.hypernetwork = False
    return model


def global_parameters(module: nn.Module, expert_parallel: int) -> int:
    """Count the parameters of the whole model, including the experts of other ranks."""
    return sum(p.numel() * (1 if getattr(p, "allreduce", True) else expert_parallel) for p in module.parameters())


def _engine_step(engine: Any) -> Step:
    """Return a step function that uses the training loop; a forward hook captures the loss."""
    losses: list[Tensor] = []
    engine.module.register_forward_hook(lambda _module, _inputs, output: losses.append(output.lm_loss.detach()))

    def step(batch: Batch) -> Tensor:
        losses.clear()
        optimizer_step(engine, _endless(batch), StepObserver())
        return losses[-1]

    return step


def _endless(batch: Batch) -> Iterator[Batch]:
    while True:
        yield batch


def _force_per_token(model: Any) -> None:
    """Use the published form, which generates a HyperExpert for each token."""
    for layer in model.model.layers:
        if layer.hyper_experts is not None:
            layer.hyper_experts.forward = partial(layer.hyper_experts.forward, form="per_token")


def _mixtral(
    model_config: HyperMoEConfig, train: TrainConfig, optimizer: OptimizerConfig, settings: StepSettings
) -> tuple[nn.Module, Step]:
    """Build Transformers' Mixtral with a plain training loop; several ranks use DistributedDataParallel.

    In bf16, weights and moments are stored in bf16 without fp32 copies. The optimizer therefore needs less memory and
    time than DeepSpeed's optimizer.
    """
    device = torch.device("cuda", torch.cuda.current_device()) if uses_gpu() else torch.device("cpu")
    torch.manual_seed(train.seed)
    model: Any = MixtralForCausalLM(mixtral_config(model_config))
    model = model.to(device, torch.bfloat16 if train.precision == "bf16" else torch.float32).train()
    adamw = _adamw(parameter_groups(model, optimizer.weight_decay), optimizer)
    parallel = DistributedDataParallel(model) if settings.ranks > 1 else model

    def step(batch: Batch) -> Tensor:
        moved = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
        for _ in range(settings.accumulation):
            output = parallel(
                input_ids=moved["input_ids"], labels=moved["labels"], shift_labels=moved["labels"], use_cache=False
            )
            (output.loss / settings.accumulation).backward()
        nn.utils.clip_grad_norm_(model.parameters(), train.clip_grad_norm)
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        loss: Tensor = output.loss.detach() - model.router_aux_loss_coef * output.aux_loss.detach()
        return loss

    return model, step


def mixtral_config(model_config: HyperMoEConfig) -> MixtralConfig:
    """Return a Mixtral configuration with the sizes of HyperMoE, except dense layers, shared experts and QK norm."""
    same = "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    same += "num_experts_per_tok rms_norm_eps tie_word_embeddings initializer_range max_position_embeddings "
    same += "router_aux_loss_coef"
    return MixtralConfig(
        **{name: getattr(model_config, name) for name in same.split()},
        intermediate_size=model_config.moe_intermediate_size,
        num_local_experts=model_config.num_experts,
        rope_parameters={"rope_type": "default", "rope_theta": model_config.rope_theta},
        output_router_logits=True,  # like HyperMoE, compute the load-balancing loss
        bos_token_id=None,
        eos_token_id=None,
    )


def _deepspeed_moe(
    model_config: HyperMoEConfig,
    ds_config: dict[str, Any],
    train: TrainConfig,
    optimizer: OptimizerConfig,
    expert_parallel: int,
) -> Any:
    """Build a DeepSpeed engine with the decoder of HyperMoE, but with DeepSpeed's older MoE layer.

    Like the MoE blocks of HyperMoE, DeepSpeed's layer drops no tokens: it pads every expert to the largest load.
    DeepSpeed's router has no z-loss. Shared experts are omitted.
    """
    torch.manual_seed(train.seed)
    model = _plain_moe(model_config)
    first = torch.distributed.get_rank() % expert_parallel * (model_config.num_experts // expert_parallel)
    for layer in (model.model.layers[index] for index in model_config.moe_layers):
        layer.mlp = _native_layer(layer.mlp, model_config, expert_parallel, first)
        layer.is_moe = False  # type: ignore[assignment] # use `mlp` as a dense MLP; the hook below adds the routing loss
    blocks = [module for module in model.modules() if isinstance(module, MoE)]

    def add_balancing_loss(_module: nn.Module, _inputs: object, output: Any) -> None:
        output.loss = output.lm_loss + model_config.router_aux_loss_coef * sum(b.deepspeed_moe.l_aux for b in blocks)

    model.register_forward_hook(add_balancing_loss)
    model.lm_head.fused_cross_entropy = fused_cross_entropy()
    ds_config.pop("expert_parallel", None)
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=parameter_groups(model, optimizer.weight_decay),
        optimizer=lambda groups: _adamw(configure_moe_param_groups(groups), optimizer),
        config=ds_config,
    )
    return engine


@torch.no_grad()
def _native_layer(block: Any, model_config: HyperMoEConfig, expert_parallel: int, first: int) -> MoE:
    """Build DeepSpeed's layer with the weights of `block`. `first` is the index of this rank's first expert."""
    layer = MoE(
        model_config.hidden_size,
        SwiGLU(model_config.hidden_size, model_config.moe_intermediate_size),
        model_config.num_experts,
        ep_size=expert_parallel,
        k=model_config.num_experts_per_tok,
        drop_tokens=False,
        top2_2nd_expert_sampling=False,  # select the two most likely experts, as `TopKRouter` does
    )
    layer.deepspeed_moe.gate.wg.weight.copy_(block.router.gate.weight)
    for number, expert in enumerate(layer.deepspeed_moe.experts.deepspeed_experts, first):
        gate_FD, up_FD = split_gate_up(block.experts.gate_up_proj[number])
        expert.gate_proj.weight.copy_(gate_FD)
        expert.up_proj.weight.copy_(up_FD)
        expert.down_proj.weight.copy_(block.experts.down_proj[number])
    layer.register_forward_hook(lambda _module, _inputs, output: output[0])
    return layer


def _adamw(groups: list[dict[str, Any]], optimizer: OptimizerConfig) -> torch.optim.Optimizer:
    """Build AdamW for the other sides, with the settings of the HyperMoE engine."""
    betas = (optimizer.beta1, optimizer.beta2)
    return torch.optim.AdamW(groups, lr=optimizer.lr, betas=betas, eps=optimizer.eps, fused=True)
