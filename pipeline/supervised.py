"""What `sft` and `reward_model` share: settings checked before training; signals and full disks while it goes on."""

import json
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from pipeline.checked import ConfigError, require
from pipeline.errors import Stopped, WriteError, writing
from pipeline.models.loading import ModelError
from pipeline.runtime.distributed import agreed_signal
from pipeline.runtime.signals import StopRequest


def check_training(run: TrainingArguments) -> None:
    """Refuse settings that train nothing, and an output_dir that cannot be written; raises `ConfigError`."""
    require(run.max_steps != 0, "max_steps", run.max_steps, "must be positive, or -1 where num_train_epochs decides")
    require(run.max_steps > 0 or run.num_train_epochs > 0, "num_train_epochs", run.num_train_epochs,
            "must be positive where max_steps is not")  # fmt: skip
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        require(getattr(run, name) > 0, name, getattr(run, name), "must be positive")
    rate = run.learning_rate
    require(rate > 0 and math.isfinite(rate), "learning_rate", rate, "must be a positive number")
    try:
        Path(run.output_dir).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=run.output_dir) as file:
            file.write(b"0")
    except OSError as error:
        raise ConfigError(f"output_dir={run.output_dir!r} cannot be written: {error.strerror}.") from error


def check_positions(config: PreTrainedConfig, setting: str, length: int) -> None:
    """Raise `ModelError` where inputs of `length` tokens, which `setting` asks for, are longer than the model reads."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if config.model_type in ("roberta", "xlm-roberta", "camembert", "longformer") and positions is not None:
        positions -= config.pad_token_id + 1  # theirs begin after the padding's
    if positions is not None and length > positions:
        raise ModelError(f"{setting}={length} is more than the {positions} positions the model has; lower it.")


def newest_checkpoint(directory: str) -> str | None:
    """The newest checkpoint that was written to its end: the trainer's state is its last file of many."""
    newest = get_last_checkpoint(directory)
    if newest is None:
        return None
    whole = []
    for path in Path(directory).glob("checkpoint-*"):
        try:
            step = json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
            for weights in path.glob("*.safetensors"):
                with safe_open(weights, "pt"):  # raises where it is cut
                    pass
            whole.append((step, path))
        except (OSError, ValueError, KeyError, SafetensorError):
            print(f"Checkpoint {path} is not whole and passed over.", flush=True)
    return str(max(whole)[1]) if whole else None


@contextmanager
def building() -> Iterator[None]:
    """Turn what the libraries say of settings that do not go together into one line; raises `ConfigError`."""
    try:
        yield
    except (ValueError, ImportError) as error:
        if isinstance(error, (ConfigError, ModelError)):
            raise
        raise ConfigError(" ".join(str(error).split())) from error


class StopCallback(TrainerCallback):
    """Ends a `Trainer` at the next step, with a checkpoint, where a signal reached any worker."""

    def __init__(self, stop: StopRequest):
        self.stop = stop
        self.number = 0  # of the signal that ended it

    def attach(self, trainer) -> None:
        self.accelerator = trainer.accelerator
        trainer.add_callback(self)

    def on_step_end(self, args, state, control, **_others):
        self.number = agreed_signal(self.accelerator, self.stop.signal_number)
        if self.number:
            control.should_save = control.should_training_stop = True
        return control

    def on_prediction_step(self, args, state, control, **_others):
        self.stop.check(self.accelerator)


class StoppableEvaluation:
    """For a `Trainer`: a signal in an evaluation during training ends both, with a checkpoint."""

    stopped: Stopped | None = None

    def evaluate(self, *arguments, **settings) -> dict[str, float]:
        try:
            return super().evaluate(*arguments, **settings)
        except Stopped as stopped:
            if not self.is_in_train:
                raise
            self.stopped = stopped
            self.control.should_save = self.control.should_training_stop = True
            return {}


def train(trainer: StoppableEvaluation, run: TrainingArguments, callback: StopCallback) -> None:
    """Train from the newest whole checkpoint, if there is one.

    Raises:
        Stopped: a signal came; there is a checkpoint of the step at which it ended.
        WriteError: the disk refused a checkpoint; those before are there.
    """
    try:
        with writing(f"a checkpoint in {run.output_dir}"):
            trainer.train(resume_from_checkpoint=newest_checkpoint(run.output_dir))
    except WriteError as error:
        raise WriteError(f"{error}. The same command goes on from the newest that is whole.") from error
    number = trainer.stopped.number if trainer.stopped is not None else callback.number
    if number:
        state = trainer.state
        steps = f"{state.global_step} of {state.max_steps} steps"
        raise Stopped(number, f" after {steps}; the same command goes on from there")
