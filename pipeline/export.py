"""Take a trained model out of the project, in files that plain transformers and PEFT load.

    python -m pipeline.export runs/quickstart --what adapter --to exported/adapter
    python -m pipeline.export runs/quickstart --what merged --to exported/merged
    python -m pipeline.export runs/quickstart/checkpoints/step_000060 --what merged --to exported/step_60
    python -m pipeline.export runs/gpt2_imdb --what full --to exported/gpt2 --push-to-hub me/gpt2-positive

Takes a finished run or any checkpoint, however many workers wrote it. The files are read back before they get their
name, and their logits held against the trained policy's. docs/export.md has what comes after.
"""

import argparse
import os
import sys
from pathlib import Path

import httpx
from huggingface_hub import HfApi, get_token, logging
from huggingface_hub.utils import HFValidationError, validate_repo_id

from pipeline.assembly import open_run
from pipeline.config import Config
from pipeline.errors import user_errors
from pipeline.exporting import Export, ExportError, is_path, write_export
from pipeline.runtime.command import command_line, raise_error
from pipeline.runtime.signals import stopping_at_once


def main() -> None:
    logging.set_verbosity_error()  # that a card has no metadata is no fault
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # everything here is on the CPU; DeepSpeed would look for a GPU
    with user_errors(), stopping_at_once():
        asked = parse(sys.argv[1:])
        run, config = open_run(__doc__, asked.run)
        export = plan(run, config, asked)
        difference = write_export(export, config, command_line("pipeline.export"))
        readers = "transformers and PEFT" if asked.what == "adapter" else "transformers"
        print(
            f"{asked.what} of {run} written to {asked.to}: read back by plain {readers}, its logits are within "
            f"{difference:.1e} of the trained policy's in float32."
        )
        if asked.push_to_hub:
            print(f"Uploaded to {upload(export.directory, asked.push_to_hub)}")


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line; raises `UserError`."""
    parser = argparse.ArgumentParser(
        "python -m pipeline.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.error = raise_error
    parser.add_argument("run", metavar="RUN", help="A finished run's folder, or RUN/checkpoints/step_….")
    parser.add_argument(
        "--what", required=True, choices=["adapter", "merged", "full"],
        help="adapter: the LoRA adapter alone, for PEFT. merged: the model with the adapter folded in, for anything "
        "that reads transformers' models. full: the model of a run without LoRA.",
    )  # fmt: skip
    parser.add_argument("--to", required=True, type=Path, metavar="DIR", help="A new folder, or an empty one.")
    parser.add_argument(
        "--base", metavar="NAME",
        help="With --what adapter: the name or folder under which the base model will be found where the adapter is "
        "used. By default the run's own model_path, a folder as an absolute path.",
    )  # fmt: skip
    parser.add_argument(
        "--push-to-hub", metavar="NAME", help="Also upload to this repository on the Hub, made private where it is new."
    )
    return parser.parse_args(arguments)


def plan(run: Path, config: Config, asked: argparse.Namespace) -> Export:
    """Check everything that needs no model; raises `ExportError`."""
    lora, base = config.model.use_peft, config.model.model_path
    if lora and asked.what == "full":
        raise ExportError(
            f"--what full: {run} trained a LoRA adapter; --what merged gives the whole model, --what adapter the "
            f"adapter alone."
        )
    if not lora and asked.what != "full":
        raise ExportError(f"--what {asked.what}: {run} trained the whole model, without LoRA; use --what full.")
    if asked.base and asked.what != "adapter":
        raise ExportError(
            f"--base {asked.base}: only an adapter names its base; leave it out with --what {asked.what}."
        )
    to = asked.to.resolve()
    if to == Path.cwd() or (to.exists() and (not to.is_dir() or any(to.iterdir()))):
        raise ExportError(f"--to {asked.to}: it exists and is not an empty folder elsewhere; name a new one.")
    if asked.push_to_hub:
        if asked.what == "adapter" and is_path(asked.base or base):
            raise ExportError(
                f"--push-to-hub {asked.push_to_hub}: the adapter's base is the folder {asked.base or base}, which "
                f"others do not "
                f"have; name it as it is on the Hub (--base NAME), or upload --what merged."
            )
        check_login(asked.push_to_hub)
    name = asked.push_to_hub or to.name
    if asked.what != "adapter":
        return Export(run, asked.what, to, None, name)
    # A Hub name is found from anywhere. A folder relative to this one is found from here only, and PEFT looks up no
    # path relative to the adapter's own folder: an absolute one is found from every folder of this machine.
    found_as = str(Path(base).resolve()) if Path(base).is_dir() else base
    return Export(run, asked.what, to, asked.base or found_as, name)


def check_login(name: str) -> None:
    """Raise `ExportError` unless the Hub can be reached and knows who uploads to `name`."""
    try:
        validate_repo_id(name)
        if get_token() is None:
            raise ExportError(f"--push-to-hub {name}: not logged in; run `hf auth login`, or set HF_TOKEN.")
        HfApi().whoami()
    except (OSError, HFValidationError, httpx.HTTPError) as error:
        raise ExportError(f"--push-to-hub {name}: {str(error).splitlines()[0]}") from error


def upload(directory: Path, name: str) -> str:
    """Upload a folder to the Hub; returns its address there. Raises `ExportError`."""
    try:
        repository = HfApi().create_repo(name, private=True, exist_ok=True)
        HfApi().upload_folder(repo_id=repository.repo_id, folder_path=directory)
    except (OSError, httpx.HTTPError) as error:
        raise ExportError(
            f"--push-to-hub {name}: {str(error).splitlines()[0]} The export is whole in {directory}; "
            f"`hf upload {name} {directory}` tries again."
        ) from error
    return str(repository)


if __name__ == "__main__":
    main()
