"""Whose recipe a file is, found from its settings."""

import pytest
from launching import ROOT

from pipeline.config import SECTIONS
from pipeline.errors import UserError
from pipeline.runtime.command import parse_recipe
from pipeline.sft import SETTINGS


@pytest.mark.parametrize(
    ("reader", "recipe", "program"),
    [
        (SECTIONS, "sft_gpt2_imdb_mini", "sft"),
        (SECTIONS, "reward_distilbert_imdb", "reward_model"),
        (SETTINGS, "quickstart", "train"),
    ],
)
def test_a_recipe_of_another_program_is_said_with_its_command(tmp_path, reader, recipe, program):
    path = tmp_path / "reward_sft.yaml"  # which says nothing
    path.write_text((ROOT / "recipes" / f"{recipe}.yaml").read_text())
    with pytest.raises(UserError) as error:
        parse_recipe(reader, "", ["--config", str(path)])
    assert str(error.value) == f"{path} is a recipe of {program}: ./launch.sh {program} {path}"


def test_a_setting_that_only_another_program_has_is_unknown_among_ones_own(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("kl_coef: 0.1\nmax_steps: 3\n")
    with pytest.raises(UserError, match="there is no setting max_steps"):
        parse_recipe(SECTIONS, "", ["--config", str(path)])
