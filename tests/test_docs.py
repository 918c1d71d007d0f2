"""Every command in README, docs and recipes: what trains is parsed as the run would, the rest runs on a small run."""

import argparse
import csv
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from launching import ROOT, interruptible, run_here, user_environment

from pipeline import train
from pipeline.assembly import parse_config
from pipeline.rewards.terms import parse_terms

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "recipes").glob("*.yaml"))]
LAUNCHED = ("chat", "evaluate", "export", "report")  # what launch.sh passes on as it is
STANDS_FOR = {"RUN": "runs/quickstart", "DIR": "exported/merged", "FILE": "pairs.jsonl"}
PAIRS = [{"prompt": "the film", "chosen": " was good", "rejected": " was bad"}] * 4


def commands(page: Path) -> list[str]:
    """The lines of a page's bash blocks, and commands within its text that are whole; those above a recipe."""
    text = page.read_text()
    if page.suffix == ".yaml":
        header = text[: text.index("\n\n")].splitlines()
        text = "\n".join(["```bash", *(line.removeprefix("# ") for line in header), "```"])
    blocks = re.findall(r"^ *```bash\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    lines += [" ".join(found.split()) for found in re.findall(r"`((?:\./launch\.sh|python -m) [^`]*)`", prose)]
    lines = [re.sub(r"\s+#.*", "", line).strip() for line in lines]
    lines = [re.sub(r"\b(RUN|DIR|FILE)\b", lambda found: STANDS_FOR[found[0]], line) for line in lines]
    ours = re.compile(r"(sbatch .*)?(\./)?launch\.sh|python -m (pipeline|benchmarks)\.")
    return list(dict.fromkeys(line for line in lines if ours.match(line) and not re.search(r"…|\b[A-Z]{3,}\b", line)))


def of_module(command: str) -> list[str] | None:
    """[module, arguments …] of a command that is neither a training nor this suite."""
    words = shlex.split(command)
    if words[:2] == ["python", "-m"]:
        return words[2:]
    return [f"pipeline.{words[1]}", *words[2:]] if words[1:2] and words[1] in LAUNCHED else None


def is_long(command: str) -> bool:
    """Minutes to hours, or not to be done without a Hub or a server of others, which the pages say."""
    module, *arguments = of_module(command)
    return module.startswith("benchmarks.") or any(option in arguments for option in ("--push-to-hub", "--share"))


COMMANDS = {command: page.stem for page in reversed(PAGES) for command in commands(page)}  # each once
NAMED = {command: pytest.param(command, id=f"{page}: {command}") for command, page in COMMANDS.items()}
TRAININGS = [named for command, named in NAMED.items() if of_module(command) is None]
MODULES = {tuple(of_module(command)): command for command in COMMANDS if of_module(command) is not None}
LONG = [NAMED[command] for command in MODULES.values() if is_long(command)]
SHORT = [NAMED[command] for command in MODULES.values() if not is_long(command)]


@pytest.mark.parametrize("command", TRAININGS)
def test_what_trains_starts_with_settings_that_are_known(command):
    words = shlex.split(command)
    after = words[next(i for i, word in enumerate(words) if word.endswith("launch.sh")) + 1 :]
    if after[:1] in (["test"], ["setup"]):
        return  # this suite, and what it runs in
    told = subprocess.run(["./launch.sh", *after, "--dry-run"], cwd=ROOT, env=user_environment(), capture_output=True,
                          text=True, timeout=60)  # fmt: skip
    assert told.returncode == 0, told.stderr
    started = shlex.split(told.stdout)
    module, settings = started[started.index("-m") + 1], started[started.index("-m") + 2 :]
    if module in ("pipeline.train", "pipeline.frontier"):
        parse_terms(parse_config("", settings).reward.reward)
    else:
        assert module in ("pipeline.sft", "pipeline.reward_model") and (ROOT / settings[1]).is_file()


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_recipe):
    """A folder as the project's, in which the runs that the pages speak of are small ones."""
    place = tmp_path_factory.mktemp("docs")
    for name in ("assets", "recipes"):
        (place / name).symlink_to(ROOT / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        tiny = ("--config", tiny_recipe, "--save_every_steps", 1)
        assert run_here(train.main, *tiny, "--output_dir", "runs/gpt2_imdb") == 0
        lora = (*tiny, "--use_peft", "true", "--lora_r", 2)
        assert run_here(train.main, *lora, "--output_dir", "runs/quickstart") == 0
    run = place / "runs/quickstart"
    shutil.copytree(run / "checkpoints/step_000003", run / "checkpoints/step_000060")
    for seed in range(2):
        shutil.copytree(run, place / "runs/seeds/quickstart" / str(seed))
    (place / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    return place


class Parsed(Exception):
    """Of a command: its arguments are read; the unknown ones."""


@pytest.mark.parametrize("command", LONG)
def test_what_takes_long_or_needs_others_knows_its_options(command, monkeypatch):
    module, *arguments = of_module(command)
    whole = argparse.ArgumentParser.parse_known_args

    def parse(self, *args, **kwargs):
        raise Parsed(whole(self, *args, **kwargs)[1])

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse)
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    monkeypatch.delitem(sys.modules, module, raising=False)  # to run it and not what another test imported
    with pytest.raises(Parsed) as unknown:
        runpy.run_module(module, run_name="__main__")
    assert unknown.value.args == ([],)


@pytest.mark.parametrize("command", SHORT)
def test_what_does_not_train_runs(command, place):
    module, *arguments = of_module(command)
    if "--read-marks" in arguments:  # somebody has marked the sheet
        with (place / arguments[arguments.index("--read-marks") + 1]).open("r+", newline="") as sheet:
            rows = [row | {"better": "tie"} for row in csv.DictReader(sheet)]
            sheet.seek(0)
            writer = csv.DictWriter(sheet, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    arguments = [found for a in arguments for found in (sorted(map(str, place.glob(a))) if "*" in a else [a])]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen([sys.executable, "-m", module, *arguments], cwd=place, env=environment, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, preexec_fn=interruptible)  # fmt: skip
    if module == "pipeline.chat":
        lines = iter(process.stdout.readline, "")
        assert any("Chat with" in line for line in lines)
        process.send_signal(signal.SIGINT)
        try:
            process.communicate(timeout=30)
        finally:
            process.kill()
        return
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
