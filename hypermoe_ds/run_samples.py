"""Find the training samples that a step of a run used, and show them as the model sees them."""

from collections.abc import Iterator
from dataclasses import dataclass

from hypermoe_ds.checkpoint.directory import find_checkpoint
from hypermoe_ds.checkpoint.manifest import Manifest
from hypermoe_ds.checkpoint.run_folder import RunFolder
from hypermoe_ds.data.tokenizer import load_tokenizer
from hypermoe_ds.data.training_set import TrainingSet, build_training_set
from hypermoe_ds.errors import UserError
from hypermoe_ds.monitor.summary import iterate_records
from hypermoe_ds.run_config import RunConfig, load_run_config
from hypermoe_ds.training.state import TrainState


@dataclass(frozen=True)
class RunSamples:
    """The training samples of a run.

    Attributes:
        folder: the run folder.
        config: the recipe of the last launch.
        samples: the samples since the data settings last changed.
    """

    folder: RunFolder
    config: RunConfig
    samples: TrainingSet

    @classmethod
    def of(cls, folder: RunFolder) -> "RunSamples":
        """Rebuild the order of a run's samples from the run's settings and newest checkpoint.

        Raises:
            UserError: the folder has no run or no checkpoint, or the settings or token files cannot be read.
        """
        if not folder.settings.is_file():
            raise UserError(str(folder.path), "is not the folder of a trained run", "give the run.dir of a run")
        config = load_run_config(folder.settings)
        state = TrainState.from_dict(Manifest.read(find_checkpoint(folder.checkpoints, None)).state.get("run", {}))
        data = config.data.model_copy(update={"on_change": "continue"})
        length, seed = config.samples(state), config.train.seed
        samples = build_training_set(data, seed, config.stages(TrainState()), length)
        if samples.stage_start(state.consumed_samples) != state.data_stage:  # the settings changed during the run
            samples = build_training_set(data, seed, config.stages(state), length, state.data_stage)
        return cls(folder, config, samples)

    def of_step(self, step: int) -> list[int]:
        """Return the indices of the samples of an optimizer step, in the order of the micro-batches.

        Raises:
            UserError: the run has not reached the step.
        """
        logged = [
            (record["step"], record["consumed_samples"])
            for record in iterate_records(self.folder.path / "metrics.jsonl")
            if "consumed_samples" in record
        ]
        last = max((number for number, _ in logged), default=0)
        if not 1 <= step <= last:
            raise UserError(f"--step {step}", f"{self.folder.path} has {last:,} logged steps", "give a step from 1")
        before, consumed = max(((number, count) for number, count in logged if number < step), default=(0, 0))
        skipped, batch = self.config.skipped_samples, self.config.train.global_batch_size
        first = skipped.after(consumed, (step - 1 - before) * batch) if step - 1 > before else consumed
        indices = [skipped.nth(first, number) for number in range(batch)]
        return indices[:: self.samples.indices_per_sample(first)]

    def describe(self, index: int) -> str:
        """Return the index of a sample, its documents and its token files in one line.

        Raises:
            UserError: the run has no such sample, or used the sample with earlier data settings.
        """
        try:
            return f"sample {index}: {self.samples.describe_sample(index)}"
        except IndexError:
            first = self.samples.stage_start(0).first
            problem = f"is not one of the samples {first} to {len(self.samples) - 1}"
            if first:
                problem += f"; the data settings changed at sample {first}"
            raise UserError(f"sample {index}", problem, "give the index of another sample") from None

    def text(self, index: int) -> Iterator[str]:
        """Yield the text of a sample, with a line of token positions before each document.

        Raises:
            UserError: see `describe`.
        """
        yield self.describe(index)
        tokenizer = load_tokenizer(self.config.data.tokenizer)
        tokens, start = self.samples[index]["tokens"].tolist(), 0
        while start < len(tokens):
            ends = [place for place in range(start, len(tokens)) if tokens[place] == tokenizer.eos_token_id]
            stop = ends[0] + 1 if ends else len(tokens)
            line = f"--- tokens {start} to {stop - 1}"
            if self.config.data.document_mask and ends:
                line += f"; the label of token {stop - 1} is ignored"
            yield line
            yield str(tokenizer.decode(tokens[start:stop]))
            start = stop
