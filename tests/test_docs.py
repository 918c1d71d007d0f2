"""Every command in README and docs: recipes and settings are parsed as the run would, smaller commands are run."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from launching import ROOT, user_environment

from pipeline.assembly import parse_config
from pipeline.rewards.terms import parse_terms

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(page: Path) -> list[str]:
    """The lines of a page's bash blocks, continued ones joined, comments and what is not ours left out."""
    blocks = re.findall(r"^ *```(?:bash|sh|shell)\n(.*?)^ *```", page.read_text(), re.DOTALL | re.MULTILINE)
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [re.sub(r"\s+#.*", "", line) for line in lines if line and not line.startswith("#")]


COMMANDS = [pytest.param(c, id=f"{page.stem}: {c[:60]}") for page in PAGES for c in commands(page)]


@pytest.mark.parametrize("command", [c for c in COMMANDS if "launch.sh" in c.values[0]])
def test_launch_commands_start_what_they_say(command):
    words = shlex.split(command)
    after = words[next(i for i, word in enumerate(words) if word.endswith("launch.sh")) + 1 :]
    if after[:1] in (["test"], ["setup"], ["--help"]):
        return  # this suite; what it runs in
    told = subprocess.run(["./launch.sh", "--dry-run", *after], cwd=ROOT, env=user_environment(), capture_output=True,
                          text=True, timeout=60)  # fmt: skip
    assert told.returncode == 0, told.stderr
    started = shlex.split(told.stdout)
    module, settings = started[started.index("-m") + 1], started[started.index("-m") + 2 :]
    if module in ("pipeline.train", "pipeline.frontier"):
        parse_terms(parse_config("", settings).reward.reward)
    else:
        assert module in ("pipeline.sft", "pipeline.reward_model") and (ROOT / settings[1]).is_file()
