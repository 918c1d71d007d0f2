"""What a training reads beside its settings: fingerprints of its texts and weights, so that none is exchanged under it.

A checkpoint says what it was trained on; who goes on from it with other texts or weights under the same names is
refused. A checkpoint of before there were fingerprints is not.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from transformers import TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from pipeline.config import Config, ConfigError
from pipeline.data.prompts import Openings
from pipeline.data.sources import Reviews
from pipeline.rewards.terms import SENTIMENT, classifier_of, parse_terms
from pipeline.run_directory import CHECKPOINTS, differing_settings, settings_of
from pipeline.runtime.checkpoints import STATE, all_checkpoints

INPUTS_FILE = "inputs.json"  # in the output directory of pipeline.sft and pipeline.reward_model
_BLOCK, _BLOCKS = 2**20, 64  # of a larger file than so many blocks, so many evenly spread ones are read

Inputs = dict[str, dict[str, str]]  # setting -> its value, what is read there, the fingerprint of that


def inputs_of(config: Config, training: Openings, held_out: Openings) -> Inputs:
    """The inputs of a PPO run: its openings as tokens, and the weights of the models it starts from."""
    return _texts(config, training, held_out) | _starts(config) | _of_weights(_classifiers(config))


def _texts(config: Config, training: Openings, held_out: Openings) -> Inputs:
    what = f"the openings that the tokenizer of {config.model.model_path} makes of its texts"
    return {"dataset": _input(config.data.dataset, what, openings_fingerprint(training, held_out))}


def openings_fingerprint(*sides: Openings) -> str:
    """What tells openings from others: their tokens in their order."""
    return _digest(part for side in sides for part in (repr(side.tokens.shape), side.tokens.numpy()))


def classifier_fingerprints(config: Config) -> dict[str, str]:
    """What tells the weights of the classifiers of a recipe's reward from others, by setting, where it is known."""
    return {setting: one["fingerprint"] for setting, one in _of_weights(_classifiers(config)).items()}


def _starts(config: Config) -> Inputs:
    return _of_weights({"model_path": config.model.model_path, "adapter_path": config.model.adapter_path})


def _of_weights(models: Mapping[str, str | None]) -> Inputs:
    """The weights at paths named by settings, where they can be told from others."""
    found = {setting: (path, _weights(path)) for setting, path in models.items() if path is not None}
    return {name: _input(path, "its weights", weights) for name, (path, weights) in found.items() if weights}


def _classifiers(config: Config) -> dict[str, str]:
    """The path of each classifier of the reward, by the setting that names it."""
    models = {}
    for term in parse_terms(config.reward.reward):
        if term.kind == SENTIMENT:
            models["reward_model_path"] = config.reward.reward_model_path
        elif term.kind == "classifier":
            models[f"reward {term.source}"] = classifier_of(term)[0]
    return models


def check_same_inputs(checkpoint: Path, config: Config, training: Openings, held_out: Openings) -> None:
    """Raise `ConfigError` where a PPO run's texts or weights are not those of the checkpoint it goes on from."""
    _, saved = _saved(checkpoint)
    if saved:
        _compare(saved, inputs_of(config, training, held_out), checkpoint, "--resume never")


def check_same_start(folder: Path, config: Config) -> None:
    """Raise `ConfigError` where the model a run, or one of its checkpoints, started from is another one by now."""
    checkpoint, saved = _saved(folder)
    starts = _starts(config)
    same_names = {name: one for name, one in saved.items() if name in starts and one["value"] == starts[name]["value"]}
    _compare(same_names, starts, checkpoint, None)


def check_same_texts(folder: Path, config: Config, training: Openings, held_out: Openings) -> None:
    """Raise `ConfigError` where a run is to be evaluated on the data it names, and that is other data by now."""
    checkpoint, saved = _saved(folder)
    if "dataset" in saved:
        names = {"model_path", *(field.name for field in fields(config.data))}
        if not names & differing_settings(settings_of(checkpoint), config).keys():
            _compare({"dataset": saved["dataset"]}, _texts(config, training, held_out), checkpoint, None)


def _saved(folder: Path) -> tuple[Path, Inputs]:
    """The newest checkpoint of a run, or the one `folder` is, and its inputs; none where there are none to compare."""
    checkpoint = [folder, *all_checkpoints(folder / CHECKPOINTS)][-1]
    try:
        return checkpoint, json.loads((checkpoint / STATE).read_text(encoding="utf-8")).get("inputs", {})
    except (OSError, ValueError):  # removed; or damaged, which is told elsewhere
        return checkpoint, {}


def keep_to_inputs(run: TrainingArguments, dataset: str, sides: Iterable[Reviews]) -> None:
    """Note what texts and labels a training of `Trainer` is of, in its directory, or hold them against that.

    Args:
        dataset: as the recipe names them.
        sides: training and held-out texts.

    Raises:
        ConfigError: the newest checkpoint there was trained on others, or the directory cannot be written.
    """
    parts = (part for side in sides for part in ("\0".join(side.texts), repr(side.labels)))
    inputs = {"dataset": _input(dataset, "its texts", _digest(parts))}
    path = Path(run.output_dir) / INPUTS_FILE
    checkpoint = get_last_checkpoint(run.output_dir) if Path(run.output_dir).is_dir() else None
    if checkpoint is None and run.process_index == 0:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(inputs, indent=1), encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"output_dir={run.output_dir!r} cannot be written: {error}; choose another.") from error
    elif checkpoint is not None and path.is_file():
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{path}, which says what the checkpoints there were trained on, cannot be read ({error}); remove it "
                f"to go on without that check, or choose another output_dir."
            ) from error
        _compare(saved, inputs, Path(checkpoint), "another output_dir")


def tell(run: TrainingArguments, notes: Iterable[str]) -> None:
    """Print notes of a training of `Trainer`, on rank zero."""
    for note in notes if run.process_index == 0 else ():
        print(note, flush=True)


def _compare(saved: Mapping[str, Mapping[str, str]], now: Inputs, checkpoint: Path, over: str | None) -> None:
    for setting in sorted(saved.keys() & now.keys()):
        then, here = saved[setting], now[setting]
        if then["fingerprint"] != here["fingerprint"]:
            raise ConfigError(
                f"{setting}={here['value']!r}: {here['what']} are not those that {checkpoint} was trained with "
                f"({then['value']!r}, fingerprint {then['fingerprint']} then and {here['fingerprint']} now). Put back "
                f"what was there{f', or start over with {over}' if over else ''}."
            )


def _input(value: str, what: str, fingerprint: str) -> dict[str, str]:
    return {"value": value, "what": what, "fingerprint": fingerprint}


def _weights(path: str) -> str | None:
    """A fingerprint of a model's weights: of a folder its files, of a Hub name the revision; None of anything else."""
    if not Path(path).is_dir():
        cached = (try_to_load_from_cache(path, name) for name in ("config.json", "adapter_config.json"))
        return next((Path(found).parent.name[:16] for found in cached if isinstance(found, str)), None)
    files = sorted(file for file in Path(path).iterdir() if file.suffix in (".safetensors", ".bin"))
    return _digest(block for file in files for block in _blocks(file))


def _blocks(file: Path) -> Iterable[bytes]:
    size = file.stat().st_size
    yield f"{file.name} {size}".encode()
    with file.open("rb") as content:
        for start in range(0, size, max(_BLOCK, size // _BLOCKS)):
            content.seek(start)
            yield content.read(_BLOCK)


def _digest(parts: Iterable[object]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part)
    return digest.hexdigest()[:16]
