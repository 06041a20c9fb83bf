"""Write run folders that look like those of long runs, without training."""

import json
import random
from pathlib import Path

from hypermoe_ds.monitor.metrics import METRICS, PARAMETER_GROUPS, STEP_PARTS

DATASETS = ("english", "code")
_AT_VALIDATION = ("valid_", "hyper_expert_contribution")
_RARE = ("parameter_norm", "update_ratio", "hyper_expert_similarity")


def write_run(
    folder: Path, steps: int = 2000, layers: int = 12, experts: int = 64, seed: int = 0, lr: float = 6e-4
) -> Path:
    """Write a run with metrics every 10 steps, a validation every 100 steps, a loss spike and a restart halfway."""
    (folder / "resolved").mkdir(parents=True)
    generator = random.Random(seed)
    items = {
        "layer": [f"moe_layer_{layer}" for layer in range(layers)],
        "dataset": DATASETS,
        "parameters": PARAMETER_GROUPS,
        "part": STEP_PARTS,
    }
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(10, steps + 1, 10):
            file.write(json.dumps(_record(step, steps, items, experts, generator)) + "\n")
            if step % 100 == 0:
                file.write(json.dumps(_record(step, steps, items, 0, generator, validation=True)) + "\n")
    half = steps // 2
    lost_at, restarted_at = 1e9 + 3 * half + 15, 1e9 + 3 * half + 3600
    lost = {
        "began": 1e9 - 20,
        "seconds": lost_at - 1e9 + 20,
        "outcome": "lost",
        "step": half + 5,
        "what": "rank 3 hung",
    }
    done = {"began": restarted_at - 20, "seconds": 3.0 * (steps - half), "outcome": "done", "step": steps, "what": ""}
    attempts = [lost, done]
    hardware = {"world_size": 8, "device": "NVIDIA H100", "parameters": {"total": 10**9, "active": 10**8}}
    launches = [{"time": at, "step": step, **hardware} for at, step in ((1e9, 0), (restarted_at, half))]
    samples = [
        {"step": step, "prompt": "Once upon", "text": f" a time </script><b>{step}</b>"}
        for step in range(100, steps + 1, 100)
    ]
    for name, lines in (("supervisor", attempts), ("launches", launches), ("samples", samples)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "resolved" / "config.yaml").write_text(f"run: {{dir: {folder}}}\noptimizer: {{lr: {lr}, beta1: 0.9}}\n")
    (folder / "resolved" / "deepspeed.json").write_text('{"zero_optimization": {"stage": 1}}')
    return folder


def _record(
    step: int,
    steps: int,
    items: dict[str, object],
    experts: int,
    generator: random.Random,
    validation: bool = False,
) -> dict[str, object]:
    pause = 3600 if step > steps // 2 else 0  # seconds between the failure and the restart
    record: dict[str, object] = {"step": step, "time": 1e9 + 3 * step + pause}
    for metric in METRICS:
        if metric.name == "expert_load" or metric.name.startswith(_AT_VALIDATION) != validation:
            continue
        if metric.name in _RARE and step % 100:
            continue
        keys = [metric.name] * (metric.total or metric.by is None)
        keys += [f"{metric.name}/{item}" for item in items.get(metric.by or "", ())]  # type: ignore[attr-defined]
        record |= {key: _value(metric.name, number, step, generator) for number, key in enumerate(keys)}
    if experts and not validation:
        for key in items["layer"]:  # type: ignore[attr-defined]
            loads = [generator.random() + 0.5 for _ in range(experts)]
            record[f"expert_load/{key}"] = [round(load / sum(loads), 5) for load in loads]
    return record


def _value(name: str, number: int, step: int, generator: random.Random) -> float:
    if name in ("consumed_tokens", "consumed_samples"):
        return 1000 * step
    spike = 5.0 if name == "loss" and step == 770 else 0.0
    return round(2.5 + 0.1 * number + 60 / (step + 10) + 0.05 * generator.random() + spike, 5)
