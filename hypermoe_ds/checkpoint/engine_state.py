"""Read and write the state of a DeepSpeed engine: for each parameter, the range of optimizer state that a rank owns.

Expert parallelism splits the experts among ranks; then ZeRO partitions each flattened parameter among the ranks that
hold it. In every layout, a rank therefore owns one range of each flattened parameter, and ranks in any other layout can
load these ranges.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils import (
    groups,
    safe_get_local_fp32_param,
    safe_get_local_grad,
    safe_get_local_optimizer_state,
)
from torch import Tensor

from hypermoe_ds.checkpoint.manifest import Count
from hypermoe_ds.checkpoint.run_folder import model_fields
from hypermoe_ds.checkpoint.shards import MOMENTS, WEIGHT, CheckpointReader


class LocalSlice(NamedTuple):
    """The part of a parameter whose optimizer state a rank owns.

    Attributes:
        shape: shape of the full parameter, with the experts of all ranks.
        start: offset of the part in the flattened parameter.
        numel: number of elements; 0 if the rank owns none.
    """

    shape: tuple[int, ...]
    start: int
    numel: int


@dataclass(frozen=True)
class Counters:
    """Counters of an engine.

    Attributes:
        optimizer_steps: AdamW's step count, used in its bias correction.
        schedule_steps: steps of the learning-rate schedule.
        global_steps: DeepSpeed's step counter.
        global_samples: DeepSpeed's sample counter.
        skipped_steps: DeepSpeed's counter of skipped steps.
        loss_scaler: state of the fp16 loss scaler.
    """

    optimizer_steps: Count
    schedule_steps: Count
    global_steps: Count
    global_samples: Count
    skipped_steps: Count
    loss_scaler: dict[str, int | float]


class EngineState:
    """Read and write the master weights, moments and counters of an engine.

    Args:
        engine: an engine with ZeRO stage 1, 2 or 3 and AdamW.

    Attributes:
        slices: the part of each parameter that this rank owns, by parameter name.
    """

    def __init__(self, engine: DeepSpeedEngine) -> None:
        self._engine = engine
        self._parameters: dict[str, Any] = dict(engine.module.named_parameters())  # with attributes that DeepSpeed adds
        self._partitioned = engine.zero_optimization_stage() == 3
        self.slices = {name: self._local_slice(parameter) for name, parameter in self._parameters.items()}

    def model(self) -> dict[str, Any]:
        """Return the fields of the model configuration that affect weights or outputs, as JSON."""
        return model_fields(self._engine.module.config)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield this rank's parts of the weights and moments by `KIND/NAME`, flattened, in fp32.

        If possible, the parts share the engine's memory.
        """
        kinds = (WEIGHT, *MOMENTS) if self.optimizer_steps else (WEIGHT,)
        for name, parameter in self._parameters.items():
            for kind in kinds if self.slices[name].numel else ():
                yield f"{kind}/{name}", self._part(parameter, kind)[: self.slices[name].numel]

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Yield this rank's parts of the averaged gradients by parameter name, flattened.

        Call this method after the last backward pass and before the step. In fp16, the gradients are still multiplied
        by the loss scale.
        """
        for name, parameter in self._parameters.items():
            numel = self.slices[name].numel
            if not numel:
                continue
            if self._partitioned:
                part = safe_get_local_grad(parameter).flatten()[:numel]
            else:
                part = parameter._hp_mapping.get_lp_grad_fragment(parameter._index_in_param_group).flatten()
                if part.numel() > numel:  # with fp32 accumulation, each rank has the full parameter's gradient
                    part = part.narrow(0, parameter._hp_mapping.lp_fragment_address.start, numel)
            yield name, part.detach()

    def counters(self) -> dict[str, Any]:
        """Return the counters as JSON."""
        return {
            "optimizer_steps": self.optimizer_steps,
            "schedule_steps": self._engine.lr_scheduler.last_epoch,
            **{name: getattr(self._engine, name) for name in ("global_steps", "global_samples", "skipped_steps")},
            "loss_scaler": self._loss_scale(),
        }

    def load(self, reader: CheckpointReader, counters: dict[str, Any]) -> None:
        """Load a checkpoint, written under any layout, before the first step (collective).

        Args:
            reader: the checkpoint; if it contains no moments, the moments start at zero.
            counters: the counters in the checkpoint; {} for a model that has not been trained.
        """
        optimizer = self._engine.optimizer
        if self._partitioned:
            optimizer.checkpoint_event_prologue()
        trained = bool(counters) and counters["optimizer_steps"] > 0
        if trained:
            self._make_moments(counters["optimizer_steps"])
        for name, parameter in self._parameters.items():
            _, start, numel = self.slices[name]
            for kind in ((WEIGHT, *MOMENTS) if trained else (WEIGHT,)) if numel else ():
                self._part(parameter, kind)[:numel].copy_(reader.read_range(name, start, start + numel, kind))
        self._update_model_weights()
        if self._partitioned:
            optimizer.checkpoint_event_epilogue()
        if counters:
            self._restore_counters(counters)

    def _local_slice(self, parameter: Any) -> LocalSlice:
        shape = tuple(parameter.ds_shape if self._partitioned else parameter.shape)
        numel = torch.Size(shape).numel()
        if self._partitioned:
            rank = torch.distributed.get_rank(parameter.ds_process_group)
            size = parameter.ds_tensor.numel()
            start = min(rank * size, numel)
            length = min(size, numel - start)  # the partitions of the last ranks are padded
        elif parameter._hp_mapping is None:
            start, length = 0, 0
        else:
            address = parameter._hp_mapping.lp_fragment_address
            start, length = address.start, address.numel
        group = getattr(parameter, "group_name", None)  # set on parameters that expert parallelism splits
        if group is None:
            return LocalSlice(shape, start, length)
        ranks = groups._get_expert_parallel_world_size(group)
        return LocalSlice(
            (shape[0] * ranks, *shape[1:]), groups._get_expert_parallel_rank(group) * numel + start, length
        )

    def _part(self, parameter: Any, kind: str) -> Tensor:
        """Return this rank's part of a weight or moment, flattened, in fp32."""
        if self._partitioned and kind == WEIGHT:
            part: Tensor = safe_get_local_fp32_param(parameter)
        elif self._partitioned:
            part = safe_get_local_optimizer_state(parameter, kind)
        else:
            # DeepSpeed 0.19.8 links moment fragments only for the first parameter group, so they are not used here.
            flat = self._flat()[parameter._hp_mapping.param_group_index]
            address = parameter._hp_mapping.hp_fragment_address
            whole = flat if kind == WEIGHT else self._engine.optimizer.optimizer.state[flat][kind]
            part = whole.narrow(0, address.start, address.numel)
        return part.detach()

    def _flat(self) -> list[Tensor]:
        """Return the optimizer's flat tensors, one per parameter group (ZeRO 3: one per subgroup)."""
        optimizer = self._engine.optimizer
        if self._partitioned:
            return list(optimizer.fp32_partitioned_groups_flat)
        return [tensor for group in optimizer.optimizer.param_groups for tensor in group["params"]]

    @property
    def optimizer_steps(self) -> int:
        """AdamW's step count, used in its bias correction."""
        state = self._engine.optimizer.optimizer.state
        return max((int(state[flat]["step"]) for flat in self._flat() if state.get(flat)), default=0)

    def _make_moments(self, steps: int) -> None:
        """Create moments of zeros and the step count; AdamW itself creates them only in its first step."""
        adamw = self._engine.optimizer.optimizer
        for flat in self._flat():
            on_device = isinstance(adamw, torch.optim.AdamW)
            step = torch.tensor(float(steps), device=flat.device) if on_device else steps
            adamw.state[flat] = {"step": step} | {kind: torch.zeros_like(flat) for kind in MOMENTS}

    def _update_model_weights(self) -> None:
        """Copy the fp32 master weights to the model's weights, as an optimizer step does."""
        optimizer = self._engine.optimizer
        if self._partitioned:
            for group in range(len(optimizer.fp32_partitioned_groups_flat)):
                optimizer._reassign_or_swap_out_partitioned_parameters(group)
        else:
            optimizer.update_lp_params()

    def _loss_scale(self) -> dict[str, float]:
        """Return the state of the loss scaler, or {} if there is none, e.g. with bf16, ZeRO 1 and fp32 accumulation."""
        scaler = getattr(self._engine.optimizer, "loss_scaler", None)
        return {} if scaler is None else {key: v for key, v in vars(scaler).items() if type(v) in (int, float)}

    def _restore_counters(self, counters: dict[str, Any]) -> None:
        engine = self._engine
        for name in ("global_steps", "global_samples", "skipped_steps"):
            setattr(engine, name, counters[name])
        if counters["loss_scaler"].keys() == self._loss_scale().keys():  # the keys differ after a change of precision
            for key, value in counters["loss_scaler"].items():
                setattr(engine.optimizer.loss_scaler, key, value)
        steps = counters["schedule_steps"]
        if steps:
            scheduler = engine.lr_scheduler
            # Set the previous step and advance, so that each parameter group gets the recipe's learning rate.
            scheduler.load_state_dict(scheduler.state_dict() | {"last_epoch": steps - 1, "_step_count": steps + 1})
            scheduler.step()
