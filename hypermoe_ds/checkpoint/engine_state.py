"""What a checkpoint keeps of a DeepSpeed engine: of each parameter the range whose optimizer state this rank holds.

ZeRO cuts each flattened parameter over the ranks that share it, and expert parallelism cuts the experts before that.
A range of the flattened whole says where a part belongs in any of these layouts, so it can be put back in any other.
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
    """The part of a parameter whose optimizer state a rank holds.

    Attributes:
        shape: shape of the whole parameter, the experts of all ranks in it.
        start: first element of the part in the flattened whole.
        numel: elements of the part, 0 where the rank has none.
    """

    shape: tuple[int, ...]
    start: int
    numel: int


@dataclass(frozen=True)
class Counters:
    """How far an engine is.

    Attributes:
        optimizer_steps: steps that count in AdamW's bias correction.
        schedule_steps: steps of the learning-rate schedule.
        global_steps: DeepSpeed's own, as the next two.
        global_samples: see there.
        skipped_steps: see there.
        loss_scaler: numbers of the fp16 loss scaler.
    """

    optimizer_steps: Count
    schedule_steps: Count
    global_steps: Count
    global_samples: Count
    skipped_steps: Count
    loss_scaler: dict[str, int | float]


class EngineState:
    """Reads and writes the master weights, the moments and the counters of an engine.

    Args:
        engine: an engine of ZeRO stage 1, 2 or 3 with AdamW.

    Attributes:
        held: what this rank holds of each parameter, by the model's names.
    """

    def __init__(self, engine: DeepSpeedEngine) -> None:
        self._engine = engine
        self._parameters: dict[str, Any] = dict(engine.module.named_parameters())  # with what DeepSpeed adds to them
        self._partitioned = engine.zero_optimization_stage() == 3
        self.held = {name: self._local_slice(parameter) for name, parameter in self._parameters.items()}

    def model(self) -> dict[str, Any]:
        """The fields of the model's configuration that change its weights or outputs, as JSON."""
        return model_fields(self._engine.module.config)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """This rank's parts, by `KIND/NAME`, in fp32 and flat: where possible the engine's own memory, not copies."""
        kinds = (WEIGHT, *MOMENTS) if self.optimizer_steps else (WEIGHT,)
        for name, parameter in self._parameters.items():
            for kind in kinds if self.held[name].numel else ():
                yield f"{kind}/{name}", self._part(parameter, kind)[: self.held[name].numel]

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """This rank's parts of the averaged gradients by parameter name, flat.

        They exist between the last backward pass and the step, and still hold the factor of the fp16 loss scale.
        """
        for name, parameter in self._parameters.items():
            numel = self.held[name].numel
            if not numel:
                continue
            if self._partitioned:
                part = safe_get_local_grad(parameter).flatten()[:numel]
            else:
                part = parameter._hp_mapping.get_lp_grad_fragment(parameter._index_in_param_group).flatten()
                if part.numel() > numel:  # with gradients added up in fp32 each rank has those of the whole parameter
                    part = part.narrow(0, parameter._hp_mapping.lp_fragment_address.start, numel)
            yield name, part.detach()

    def counters(self) -> dict[str, Any]:
        """How far the engine is, as JSON."""
        return {
            "optimizer_steps": self.optimizer_steps,
            "schedule_steps": self._engine.lr_scheduler.last_epoch,
            **{name: getattr(self._engine, name) for name in ("global_steps", "global_samples", "skipped_steps")},
            "loss_scaler": self._loss_scale(),
        }

    def load(self, reader: CheckpointReader, counters: dict[str, Any]) -> None:
        """Take up a checkpoint of any layout, before the first step (collective).

        Args:
            reader: the checkpoint; without moments the optimizer starts anew.
            counters: what `counters` gave then; {} for a model that has not trained.
        """
        optimizer = self._engine.optimizer
        if self._partitioned:
            optimizer.checkpoint_event_prologue()
        trained = bool(counters) and counters["optimizer_steps"] > 0
        if trained:
            self._make_moments(counters["optimizer_steps"])
        for name, parameter in self._parameters.items():
            _, start, numel = self.held[name]
            for kind in ((WEIGHT, *MOMENTS) if trained else (WEIGHT,)) if numel else ():
                self._part(parameter, kind)[:numel].copy_(reader.read_range(name, start, start + numel, kind))
        self._spread_weights()
        if self._partitioned:
            optimizer.checkpoint_event_epilogue()
        if counters:
            self._take_counters(counters)

    def _local_slice(self, parameter: Any) -> LocalSlice:
        shape = tuple(parameter.ds_shape if self._partitioned else parameter.shape)
        numel = torch.Size(shape).numel()
        if self._partitioned:
            rank = torch.distributed.get_rank(parameter.ds_process_group)
            size = parameter.ds_tensor.numel()
            start = min(rank * size, numel)
            length = min(size, numel - start)  # the last ones end in padding
        elif parameter._hp_mapping is None:
            start, length = 0, 0
        else:
            address = parameter._hp_mapping.lp_fragment_address
            start, length = address.start, address.numel
        group = getattr(parameter, "group_name", None)  # of the parameters that expert parallelism cuts
        if group is None:
            return LocalSlice(shape, start, length)
        ranks = groups._get_expert_parallel_world_size(group)
        return LocalSlice(
            (shape[0] * ranks, *shape[1:]), groups._get_expert_parallel_rank(group) * numel + start, length
        )

    def _part(self, parameter: Any, kind: str) -> Tensor:
        """The flat fp32 memory of this rank's part."""
        if self._partitioned and kind == WEIGHT:
            part: Tensor = safe_get_local_fp32_param(parameter)
        elif self._partitioned:
            part = safe_get_local_optimizer_state(parameter, kind)
        else:
            # Not through DeepSpeed's own fragments of the moments: in 0.19.8 only those of the first group are linked.
            flat = self._flat()[parameter._hp_mapping.param_group_index]
            address = parameter._hp_mapping.hp_fragment_address
            whole = flat if kind == WEIGHT else self._engine.optimizer.optimizer.state[flat][kind]
            part = whole.narrow(0, address.start, address.numel)
        return part.detach()

    def _flat(self) -> list[Tensor]:
        """The tensors that the optimizer steps on, one a group (of ZeRO-3 one a subgroup): all its parts in a row."""
        optimizer = self._engine.optimizer
        if self._partitioned:
            return list(optimizer.fp32_partitioned_groups_flat)
        return [tensor for group in optimizer.optimizer.param_groups for tensor in group["params"]]

    @property
    def optimizer_steps(self) -> int:
        """Steps that count in AdamW's bias correction."""
        state = self._engine.optimizer.optimizer.state
        return max((int(state[flat]["step"]) for flat in self._flat() if state.get(flat)), default=0)

    def _make_moments(self, steps: int) -> None:
        """Moments as after a number of steps, of zeros: AdamW makes them in its first one."""
        adamw = self._engine.optimizer.optimizer
        for flat in self._flat():
            on_device = isinstance(adamw, torch.optim.AdamW)
            step = torch.tensor(float(steps), device=flat.device) if on_device else steps
            adamw.state[flat] = {"step": step} | {kind: torch.zeros_like(flat) for kind in MOMENTS}

    def _spread_weights(self) -> None:
        """From the fp32 master weights into those that compute, as after a step."""
        optimizer = self._engine.optimizer
        if self._partitioned:
            for group in range(len(optimizer.fp32_partitioned_groups_flat)):
                optimizer._reassign_or_swap_out_partitioned_parameters(group)
        else:
            optimizer.update_lp_params()

    def _loss_scale(self) -> dict[str, float]:
        """State of the loss scaler; {} for an optimizer without one (bf16, ZeRO-1, gradients added up in fp32)."""
        scaler = getattr(self._engine.optimizer, "loss_scaler", None)
        return {} if scaler is None else {key: v for key, v in vars(scaler).items() if type(v) in (int, float)}

    def _take_counters(self, counters: dict[str, Any]) -> None:
        engine = self._engine
        for name in ("global_steps", "global_samples", "skipped_steps"):
            setattr(engine, name, counters[name])
        if counters["loss_scaler"].keys() == self._loss_scale().keys():  # else of another precision
            for key, value in counters["loss_scaler"].items():
                setattr(engine.optimizer.loss_scaler, key, value)
        steps = counters["schedule_steps"]
        if steps:
            scheduler = engine.lr_scheduler
            # One step before, then the step: so that the rate of each parameter group is the recipe's for this step.
            scheduler.load_state_dict(scheduler.state_dict() | {"last_epoch": steps - 1, "_step_count": steps + 1})
            scheduler.step()
