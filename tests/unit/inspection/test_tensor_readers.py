"""Test that tensor readers return any range of the training model's parameters from every kind of folder."""

import json
from pathlib import Path

import pytest
import torch

from hypermoe_ds.checkpoint.run_folder import check_step
from hypermoe_ds.checkpoint.shards import write_weights
from hypermoe_ds.errors import UserError
from hypermoe_ds.inspection.tensor_readers import TensorReader, open_tensor_reader, ranges
from tests.helpers.checkpoints import small_model, training_weights, write_checkpoint, write_run


def assert_reads(reader: TensorReader, expected: dict[str, torch.Tensor], kind: str = "weight") -> None:
    """Check that the reader returns the expected values of complete parameters and of random ranges."""
    assert reader.shapes == {name: tuple(tensor.shape) for name, tensor in expected.items()}
    generator = torch.Generator().manual_seed(1)
    for name, tensor in expected.items():
        flat = tensor.float().flatten()
        assert torch.equal(reader.read_range(name, 0, len(flat), kind), flat), name
        for _ in range(4):
            start, stop = sorted(torch.randint(len(flat) + 1, (2,), generator=generator).tolist())
            assert torch.equal(reader.read_range(name, start, stop, kind), flat[start:stop]), (name, start, stop)


def test_a_checkpoint_gives_its_weights_and_moments_however_they_are_sharded(tmp_path: Path) -> None:
    weights = training_weights(small_model())
    written = write_checkpoint(tmp_path / "cut", weights, moments=True)
    with open_tensor_reader(tmp_path / "cut") as reader:
        assert reader.kinds == ("weight", "exp_avg", "exp_avg_sq")
        for kind in reader.kinds:
            assert_reads(reader, {name: written[f"{kind}/{name}"] for name in weights}, kind)
        assert (reader.provenance.kind, reader.provenance.step, len(reader.provenance.files)) == (
            "checkpoint folder",
            7,
            2,
        )
        assert reader.provenance.cut_tensors == sum(weight.numel() > 1 for weight in weights.values())
        assert reader.provenance.written_by["torch"] == torch.__version__


def test_a_checkpoint_written_by_one_process_can_be_read(tmp_path: Path) -> None:
    weights = training_weights(small_model())
    write_weights(tmp_path, weights.items(), {}, {}, shard_bytes=20_000)
    with open_tensor_reader(tmp_path) as reader:
        assert_reads(reader, weights)
        assert (reader.kinds, reader.provenance.step, reader.provenance.cut_tensors) == (("weight",), 0, 0)
        assert len(reader.provenance.files) > 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", ["5GB", "30KB"])
def test_a_hugging_face_folder_gives_the_training_models_parameters(
    dtype: torch.dtype, size: str, tmp_path: Path
) -> None:
    model = small_model(tie_word_embeddings=False).to(dtype)
    model.save_pretrained(tmp_path, max_shard_size=size)
    with open_tensor_reader(tmp_path) as reader:
        assert_reads(reader, training_weights(model))
        assert (len(reader.provenance.files) > 2) == (size == "30KB")
        assert reader.provenance.dtypes == ({torch.float32: "F32", torch.bfloat16: "BF16"}[dtype],)
        assert (reader.provenance.step, reader.kinds) == (None, ("weight",))


def test_the_experts_of_other_models_keep_their_names(tmp_path: Path) -> None:
    small_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "another"}))
    with open_tensor_reader(tmp_path) as reader:
        assert {"model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"} <= set(reader.shapes)


def test_a_run_folder_gives_its_newest_checkpoint_or_the_one_asked_for(tmp_path: Path) -> None:
    model = small_model()
    first, second = (training_weights(small_model(seed)) for seed in (1, 2))
    run = write_run(tmp_path / "run", model, {3: first, 5: second})
    for step, expected in ((None, second), (3, first), (5, second)):
        with open_tensor_reader(run, step) as reader:
            assert_reads(reader, expected)
            assert reader.provenance.step == (step or 5)
            assert reader.provenance.kind == "run folder"
    check_step(3, [tmp_path, run])
    with pytest.raises(UserError, match="--step=3: only run folders have steps, but none is given; remove it"):
        check_step(3, [tmp_path])
    with pytest.raises(UserError, match="does not exist"):
        open_tensor_reader(run, 4)


def test_an_incomplete_folder_is_refused_with_the_name_of_the_file(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="is not a run folder, checkpoint folder or Hugging Face folder; give one of them"
    ):
        open_tensor_reader(tmp_path)
    small_model().save_pretrained(tmp_path, max_shard_size="30KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[:100])
    with pytest.raises(UserError, match=rf"{shard.name}: cannot be read"):
        open_tensor_reader(tmp_path)
    shard.unlink()
    with pytest.raises(UserError, match=rf"{shard.name}: is missing or not a file"):
        open_tensor_reader(tmp_path)
    for path in tmp_path.glob("*.safetensors*"):
        path.unlink()
    with pytest.raises(UserError, match=r"has no weights \(neither model.safetensors nor"):
        open_tensor_reader(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json: cannot be read"):
        open_tensor_reader(tmp_path)


@pytest.mark.parametrize("elements", [0, 1, 9, 10, 11, 25])
def test_ranges_cover_everything_once(elements: int) -> None:
    cut = list(ranges(elements, 10))
    assert [i for start, stop in cut for i in range(start, stop)] == list(range(elements))
    assert all(stop - start <= 10 for start, stop in cut)
