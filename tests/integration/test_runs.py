"""Resumed runs equal uninterrupted runs, and a run folder has the documented content."""

import gzip
import json
import math
import re
import shutil
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hypermoe_ds.checkpoint.shards import CheckpointReader
from hypermoe_ds.data.token_files import inspect
from hypermoe_ds.errors import EXIT_BAD_INPUT
from hypermoe_ds.monitor.metrics import METRICS, metric_of
from tests.helpers.corpus import TokenisedCorpus
from tests.helpers.jobs import RUNTIME_METRICS, TRAIN, arguments_of, run_script
from tests.helpers.routing import TOLERANCE_AFTER_TIE, assert_same_until_a_tie, read_routing

STEPS = 8
LAST = f"checkpoints/step_{STEPS:08d}"


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def training_records(run: Path) -> list[dict[str, Any]]:
    return [record for record in records(run) if "loss" in record]


def test_a_resumed_run_logs_bitwise_identical_metrics(reference_run: Path, stopped_run: Path) -> None:
    def without_clock(run: Path) -> list[dict[str, Any]]:
        return [
            {key: value for key, value in record.items() if key.partition("/")[0] not in RUNTIME_METRICS}
            for record in records(run)
        ]

    assert without_clock(stopped_run) == without_clock(reference_run)


def test_a_resumed_run_saves_a_bitwise_identical_checkpoint(reference_run: Path, stopped_run: Path) -> None:
    last = f"checkpoints/step_{STEPS:08d}"
    with (
        CheckpointReader(reference_run / last, "full") as whole,
        CheckpointReader(stopped_run / last, "full") as stopped,
    ):
        assert whole.manifest.files == stopped.manifest.files, "the hashes of the files differ"
        assert len(whole.manifest.files) == 2
        assert whole.manifest.state == stopped.manifest.state
        assert whole.manifest.tensors == stopped.manifest.tensors
        assert whole.manifest.kinds == ("weight", "exp_avg", "exp_avg_sq")


def test_a_run_moved_to_other_ranks_and_stages_logs_the_same_metrics(stopped_run: Path, moved_run: Path) -> None:
    moved, stayed = training_records(moved_run), training_records(stopped_run)
    assert len(moved) == len(stayed) == STEPS
    for key in ("step", "consumed_samples", "lr"):
        assert [record[key] for record in moved] == [record[key] for record in stayed]
    numbers = [
        [[record[name] for name in ("loss", "aux_loss", "z_loss", "total_loss", "grad_norm")] for record in of]
        for of in (moved, stayed)
    ]
    routing = read_routing(moved_run, STEPS), read_routing(stopped_run, STEPS)
    tie = assert_same_until_a_tie(*numbers, routing, 1e-4)
    ours, theirs = (
        {record["step"]: record["valid_loss"] for record in records(run) if "valid_loss" in record}
        for run in (moved_run, stopped_run)
    )
    for step in (4, 8):  # the routing of validations is not recorded, so ties within them cannot be found
        relative = 1e-3 if tie is None or step <= tie.step else TOLERANCE_AFTER_TIE
        assert ours[step] == pytest.approx(theirs[step], rel=relative)


def test_the_newest_checkpoints_are_kept(reference_run: Path, stopped_run: Path) -> None:
    for run in (reference_run, stopped_run):
        folder = run / "checkpoints"
        assert sorted(path.name for path in folder.glob("*_0*")) == ["step_00000006", "step_00000008"]
        assert (folder / "latest").read_text().strip() == "step_00000008"


def test_metrics_have_each_logged_step_once_and_in_order(reference_run: Path, stopped_run: Path) -> None:
    for run in (reference_run, stopped_run):
        assert [record["step"] for record in training_records(run)] == list(range(1, STEPS + 1))
        assert all(one["step"] <= other["step"] for one, other in pairwise(records(run)))


def test_metrics_have_the_documented_keys(reference_run: Path, corpus: TokenisedCorpus) -> None:
    name, groups = Path(corpus.train).name, ("experts", "hypernetwork", "routers", "rest")
    parts = ("data", "forward", "backward", "optimizer", "checkpoint", "other")
    per_layer = ("router_entropy", "hyper_expert_norm_ratio", "distinct_selections", "expert_load")
    per_layer += ("expert_load_max_over_mean", "expert_load_min_over_mean", "experts_without_tokens")
    named = {"step", "time", "loss", "aux_loss", "z_loss", "total_loss", "lr", "grad_norm", "skipped_steps"}
    named |= {"tokens_per_second", "tokens_per_second_per_gpu", "step_seconds", "peak_memory_gib"}
    named |= {"consumed_samples", "consumed_tokens", f"consumed_tokens/{name}", f"epochs/{name}"}
    named |= {f"grad_norm/{group}" for group in groups} | {f"step_seconds/{part}" for part in parts}
    named |= {f"{metric}/moe_layer_{layer}" for metric in per_layer for layer in (0, 1)}
    normed = {f"{metric}/{group}" for metric in ("parameter_norm", "update_ratio") for group in groups}
    normed |= {f"hyper_expert_similarity/moe_layer_{layer}" for layer in (0, 1)}
    for number, record in enumerate(training_records(reference_run), start=1):
        assert record.keys() == named | (normed if number % 4 == 0 else set())
        assert record["consumed_samples"] == 8 * number
        assert record["consumed_tokens"] == record[f"consumed_tokens/{name}"] == 8 * 32 * number
        assert record["total_loss"] == pytest.approx(
            record["loss"] + 2 * (0.01 * record["aux_loss"] + 0.001 * record["z_loss"]), rel=1e-5
        )
        assert record["tokens_per_second"] > 0
        assert sum(record[f"step_seconds/{part}"] for part in parts) == pytest.approx(record["step_seconds"])
        assert sum(record[f"grad_norm/{group}"] ** 2 for group in groups) == pytest.approx(record["grad_norm"] ** 2)
        for layer in (0, 1):
            load = record[f"expert_load/moe_layer_{layer}"]
            assert sum(load) == pytest.approx(1, abs=1e-4)
            largest = record[f"expert_load_max_over_mean/moe_layer_{layer}"]
            assert max(load) * len(load) == pytest.approx(largest, abs=1e-4)
    validations = [record for record in records(reference_run) if "valid_loss" in record]
    assert [record["step"] for record in validations] == [4, 8]
    valid, losses = Path(corpus.valid).name, ("loss", "perplexity", "bits_per_byte", "loss_without_hyper_experts")
    keys = {*(f"valid_{loss}" for loss in losses), "hyper_expert_contribution"}
    for record in validations:
        assert record.keys() == {"step", "time"} | keys | {f"{key}/{valid}" for key in keys}
    first = training_records(reference_run)[0]["lr"]
    assert first == yaml.safe_load((reference_run / "resolved" / "config.yaml").read_text())["optimizer"]["lr"] / 2
    keys_seen = {key for record in records(reference_run) for key in record} - {"step", "time"}
    assert {key for key in keys_seen if metric_of(key) is None} == set(), "the registry lacks these metrics"
    not_seen = {metric.name for metric in METRICS} - {key.partition("/")[0] for key in keys_seen}
    assert not_seen == {"loss_scale", "tflops_per_gpu", "mfu", "memory_allocated_gib", "memory_reserved_gib"}


def test_bits_per_byte_equal_those_of_the_text(reference_run: Path, corpus: TokenisedCorpus) -> None:
    text = corpus.texts[0].read_bytes()
    tokens = inspect(corpus.valid).tokens
    for record in records(reference_run):
        if "valid_loss" in record:
            bits = record["valid_loss"] / math.log(2) * tokens
            assert record["valid_bits_per_byte"] == pytest.approx(bits / len(text.strip()), rel=1e-2)


def test_measuring_metrics_changes_no_weight(recipe: Path, reference_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    off = ["monitor.interval=8", "monitor.norms_interval=null", "monitor.tensorboard=false"]
    off += ["evaluation.hyper_expert_contribution=false", "evaluation.interval=8", "evaluation.prompts=[]"]
    run_script(TRAIN, *arguments_of(recipe, f"run.dir={run}", "parallel.expert=2", *off), folder=tmp_path, ranks=2)
    with CheckpointReader(run / LAST) as plain, CheckpointReader(reference_run / LAST) as measured:
        assert plain.manifest.files == measured.manifest.files, "the hashes of the files differ"
    assert records(run)[-1]["valid_loss"] == records(reference_run)[-1]["valid_loss"]
    samples = [json.loads(line) for line in (reference_run / "samples.jsonl").read_text().splitlines()]
    assert [(sample["step"], sample["prompt"]) for sample in samples] == [(4, "import os"), (8, "import os")]
    assert not (run / "samples.jsonl").exists()


def test_a_profile_names_the_parts_of_the_model_and_changes_no_weight(
    recipe: Path, reference_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    given = ["monitor.profile_steps=[2, 3]", "monitor.profile_ranks=[1]", "evaluation.interval=8", "train.steps=8"]
    run_script(TRAIN, *arguments_of(recipe, f"run.dir={run}", "parallel.expert=2", *given), folder=tmp_path, ranks=2)
    profile = run / "profile"
    names = ["rank_00001_steps_2_3.json.gz", "rank_00001_steps_2_3_operators.txt"]
    assert sorted(path.name for path in profile.iterdir()) == names
    with gzip.open(profile / names[0]) as file:
        events = Counter(event.get("name") for event in json.load(file)["traceEvents"] if event.get("ph") == "X")
    layers, micro_batches = 2, 4  # two MoE layers, and four micro-batches in the two profiled steps
    once = dict.fromkeys(("data", "forward", "backward", "optimizer", "head"), micro_batches)
    assert {name: events[name] for name in once} == once
    for name in ("attention", "router", "dispatch", "experts", "combine"):
        assert events[name] == layers * micro_batches, name
    assert events["hyper_experts"] >= layers * micro_batches
    table = (profile / names[1]).read_text()
    assert "Self CPU time total" in table
    operators = [line.split()[0] for line in table.splitlines() if re.match(r" +(?!Name)\S+.*%", line)]
    assert len(operators) == 10
    assert not {"forward", "backward", "attention"} & set(operators)
    with CheckpointReader(run / LAST) as profiled, CheckpointReader(reference_run / LAST) as plain:
        assert profiled.manifest.files == plain.manifest.files, "the hashes of the files differ"


def test_the_run_learns(reference_run: Path) -> None:
    losses = [record["valid_loss"] for record in records(reference_run) if "valid_loss" in record]
    assert losses[1] < losses[0] < 6.3, "the first loss should be about ln 512 = 6.24"


def test_tensorboard_has_the_metrics_and_the_expert_loads(reference_run: Path) -> None:
    folder, written = reference_run / "tensorboard" / "run", training_records(reference_run)
    board = EventAccumulator(str(folder))
    board.Reload()
    for tag, name in (("1_loss/loss", "loss"), ("3_optimization/grad_norm", "grad_norm")):
        assert [(event.step, event.value) for event in board.Scalars(tag)] == [
            (record["step"], pytest.approx(record[name], rel=1e-6)) for record in written
        ]
    assert [event.step for event in board.Scalars("2_validation/valid_loss")] == [4, 8]
    assert board.Histograms("7_routing/expert_load_over_mean")[0].histogram_value.num == 8
    assert {"recipe/text_summary", "versions/text_summary", "sample/0/text_summary"} <= set(board.Tags()["tensors"])
    layer = EventAccumulator(str(folder / "moe_layer_01"))
    layer.Reload()
    entropies = [event.value for event in layer.Scalars("7_routing/router_entropy")]
    assert entropies == pytest.approx([record["router_entropy/moe_layer_1"] for record in written], rel=1e-6)


def test_all_resolved_settings_are_saved(reference_run: Path, recipe: Path) -> None:
    resolved = reference_run / "resolved"
    settings = yaml.safe_load((resolved / "config.yaml").read_text())
    given = yaml.safe_load(recipe.read_text())
    assert settings["run"]["dir"] == str(reference_run)
    assert settings["parallel"] == {"expert": 2, "overlap_hyper_experts": True}
    assert settings["optimizer"] == {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
    assert given["train"].items() <= settings["train"].items()
    ds_config = json.loads((resolved / "deepspeed.json").read_text())
    assert ds_config["gradient_accumulation_steps"] == 2
    assert ds_config["expert_parallel"]["autoep_size"] == 2
    model = json.loads((resolved / "model" / "config.json").read_text())
    assert given["model"].items() <= model.items()
    tokenizer = Path(given["data"]["tokenizer"])
    for file in tokenizer.iterdir():
        assert (resolved / "tokenizer" / file.name).read_bytes() == file.read_bytes()


def test_the_resolved_recipe_relaunches_the_run(stopped_run: Path) -> None:
    from hypermoe_ds.run_config import load_run_config  # noqa: PLC0415

    config = load_run_config(stopped_run / "resolved" / "config.yaml")
    assert config.run.dir == str(stopped_run)


def test_a_launch_ignores_unrelated_files_in_the_run_folder(stopped_run: Path, recipe: Path, tmp_path: Path) -> None:
    run, archive = tmp_path / "run", tmp_path / "archive"
    shutil.copytree(stopped_run, run)
    checkpoints = run / "checkpoints"
    (checkpoints / "step_00000006").rename(archive)
    (checkpoints / "step_00000006").symlink_to(archive)
    shutil.copytree(checkpoints / "step_00000008", checkpoints / "step_00000010")
    shard = checkpoints / "step_00000010/shard_00001.safetensors"
    shard.write_bytes(bytes(64) + shard.read_bytes()[64:])
    (checkpoints / "latest").write_bytes(b"\xff\xfe")
    (checkpoints / ".step_notes").touch()
    (checkpoints / ".step_00000012.partial").touch()
    (run / "watch/notes").mkdir()
    with (run / "metrics.jsonl").open("ab") as metrics:
        metrics.write(b'\xff\xfe\0\n[]\n{"st')
    words = ["train.steps=10", "train.stop_at_step=9", "checkpoint.keep_last=1", "checkpoint.interval=1"]
    done = run_script(TRAIN, *arguments_of(recipe, f"run.dir={run}", *words), folder=tmp_path)
    assert done.returncode == 0, done.output()
    warnings = [line for line in done.stdout.splitlines() if line.startswith("warning: ")]
    assert "checkpoints/latest: does not name an existing checkpoint; using the newest, step_00000010" in warnings[0]
    assert "step_00000010/shard_00001.safetensors: has changed since it was written" in warnings[1]
    assert "; resumed from step 8\n" in done.stdout
    left = {".step_notes", "latest", "step_00000009", "step_00000010.damaged"}
    assert {path.name for path in checkpoints.iterdir()} == left
    assert (archive / "manifest.json").exists(), "only the link is removed, not its target"
    assert [record["step"] for record in training_records(run)] == list(range(1, STEPS + 2))


def test_a_launch_rewrites_a_missing_configuration_and_reports_a_damaged_one(
    stopped_run: Path, recipe: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(stopped_run, run)
    model, words = run / "resolved/model/config.json", arguments_of(recipe, f"run.dir={run}")
    before = model.read_bytes()
    model.write_bytes(b"")
    done = run_script(TRAIN, *words, folder=tmp_path)
    assert (done.returncode, done.stdout) == (EXIT_BAD_INPUT, "")
    assert f"error: {model}: is damaged (" in done.stderr
    model.unlink()
    done = run_script(TRAIN, *words, "model.num_experts_per_tok=1", folder=tmp_path)
    assert done.returncode == EXIT_BAD_INPUT
    assert f"error: model.num_experts_per_tok=1: differs from 2 in the run folder {run}; " in done.stderr
    done = run_script(TRAIN, *words, folder=tmp_path)
    assert done.returncode == 0, done.output()
    assert model.read_bytes() == before
