"""What is exported loads elsewhere, with transformers and PEFT alone, and says what the trained policy says."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import recorded_run
import torch
import yaml
from launching import ROOT, run_here
from peft import LoraConfig, get_peft_model
from recorded_run import PROBE
from transformers import AutoModelForCausalLM

from pipeline import export, train
from pipeline.assembly import open_run, open_tuned
from pipeline.config import RolloutSettings
from pipeline.exporting import Export, ExportError, write_export
from pipeline.models.loading import load_tokenizer
from pipeline.models.saving import save_policy

LORA = ("--use_peft", "--lora_r", "4", "--learning_rate", "1e-2")
EXPORTS = [  # of which run, from where in it, what
    ("positive", ".", "adapter"),
    ("positive", ".", "merged"),
    ("positive", "checkpoints/step_000003", "adapter"),
    ("positive", "checkpoints/step_000003", "merged"),
    ("negative", ".", "adapter"),
    ("full", ".", "full"),
    ("full", "checkpoints/step_000003", "full"),
]
# Runs isolated from the project: python -I reader.py FOLDER…
READER = """
import importlib.util, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
assert importlib.util.find_spec("pipeline") is None
probe = torch.arange(12).view(2, 6)
with torch.no_grad():
    for folder in sys.argv[1:]:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        assert AutoTokenizer.from_pretrained(folder)("the film").input_ids
        torch.save(model(input_ids=probe).logits, folder + "/logits.pt")
"""


def name_of(run: str, part: str, what: str) -> str:
    return f"{run}_{Path(part).name}_{what}".replace("__", "_")


@pytest.fixture(scope="module")
def base(tmp_path_factory, tiny_lm, tokenizer):
    """The folder of an original stored in bfloat16, as the shipped one and most on the Hub are."""
    folder = tmp_path_factory.mktemp("base") / "stored-lowered"
    AutoModelForCausalLM.from_pretrained(tiny_lm).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_recipe, base):
    """Two LoRA runs and a full one, each with the logits its policy had at the end beside it."""
    root = tmp_path_factory.mktemp("runs")
    for name, settings in [("positive", LORA), ("negative", (*LORA, "--reward_label", "NEGATIVE")), ("full", ())]:
        (root / name).mkdir()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(recorded_run, "RECORD", root / name)
            patch.setattr(train, "full_state_dict", recorded_run.saving)
            options = ("--config", tiny_recipe, "--model_path", base, "--output_dir", root / name / "run", *settings)
            assert run_here(train.main, *options) == 0
    return root


@pytest.fixture(scope="module")
def exported(runs, base):
    """The folder of all exports, read by one process that knows transformers and PEFT and not this project."""
    folder = runs / "exported"
    for run, part, what in EXPORTS:
        to = folder / name_of(run, part, what)
        assert run_here(export.main, runs / run / "run" / part, "--what", what, "--to", to) == 0
    for name in ("positive", "negative"):  # as docs/export.md calls them
        (folder / name).symlink_to(name_of(name, ".", "adapter"))
    (runs / "base").symlink_to(base)
    (runs / "reader.py").write_text(READER + documented_switching())
    folders = [str(folder / name_of(*one)) for one in EXPORTS]
    done = subprocess.run([sys.executable, "-I", "reader.py", *folders], cwd=runs, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def documented_switching() -> str:
    """The code of docs/export.md that switches adapters, for the tokens of the tests, and what keeps its logits."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/export.md").read_text(), re.DOTALL)
    block = next(block for block in blocks if "load_adapter" in block)
    probe = 'inputs = {"input_ids": probe}'
    block = re.sub(r"^inputs = .*$", probe, block, count=1, flags=re.MULTILINE)
    return f"{block}\ntorch.save(logits, 'switched.pt')\n"


@pytest.mark.parametrize(("run", "part", "what"), EXPORTS)
def test_a_process_without_this_project_gets_the_logits_of_the_trained_policy(exported, runs, run, part, what):
    found = torch.load(exported / name_of(run, part, what) / "logits.pt")
    assert (found - torch.load(runs / run / "logits.pt")).abs().max() < 1e-4


def test_the_policies_differ_from_their_original_and_from_each_other_by_far_more(runs, base):
    with torch.no_grad():
        original = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)(input_ids=PROBE).logits
    logits = [original, *(torch.load(runs / name / "logits.pt") for name in ("positive", "negative", "full"))]
    for i, one in enumerate(logits):
        assert all((one - other).abs().max() > 0.01 for other in logits[:i])


def test_adapters_are_switched_on_one_base_as_the_documentation_says(exported, runs, base):
    found = torch.load(runs / "switched.pt")
    for name in ("positive", "negative"):
        assert (found[name] - torch.load(runs / name / "logits.pt")).abs().max() < 1e-4
    with torch.no_grad():
        original = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)(input_ids=PROBE).logits
    assert (found["original"] - original).abs().max() < 1e-5


def test_a_folder_has_what_its_users_need_and_nothing_of_ppo(exported, base):
    for what, weights in (("adapter", "adapter_model.safetensors"), ("merged", "model.safetensors")):
        names = {path.name for path in (exported / name_of("positive", ".", what)).iterdir()} - {"logits.pt"}
        own = {"adapter_config.json"} if what == "adapter" else {"config.json"}
        always = {"README.md", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
        assert names == always | own | {weights}
    settings = json.loads((exported / name_of("positive", ".", "adapter") / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(base.resolve())


def test_the_card_has_the_runs_figures_how_to_load_it_and_what_is_known_of_licences(exported, runs):
    card = (exported / name_of("positive", ".", "adapter") / "README.md").read_text()
    figures = json.loads((runs / "positive/run/evaluation.json").read_text())
    assert f"| KL from the original, nats a response | 0 | {figures['kl']:.2f} (" in card
    assert "dtype=torch.float32" in card and "PeftModel.from_pretrained(base, " in card and "library_name: peft" in card
    assert "unknown: its card states none." in card and "unknown: no card states one." in card
    assert "rank 4, alpha 32" in card and "python -m pipeline.export" in card
    card = (exported / name_of("positive", "checkpoints/step_000003", "merged") / "README.md").read_text()
    assert "that of step 3: reward" in card and "PeftModel" not in card and "library_name: transformers" in card


def test_what_others_wrote_is_text_in_the_card(runs, tmp_path):
    run, base = tmp_path / "run", tmp_path / 'ba`se"\n```\n<img src=x>'
    shutil.copytree(runs / "full/run", run)
    _, config = open_run("", str(run))
    shutil.copytree(config.model.model_path, base)
    (base / "README.md").write_text('---\nlicense: "mit\\n\\n## Injected\\n<script>"\n---\n')
    settings = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump(settings | {"model_path": str(base)}))
    assert run_here(export.main, run, "--what", "full", "--to", tmp_path / "to") == 0
    card = (tmp_path / "to/README.md").read_text()
    lines = card.splitlines()
    assert "## Injected" not in lines and "<script>" not in card and r"mit ## Injected \<script\>" in card
    assert [line for line in lines if line.startswith("```")] == ["```python", "```", "```", "```"]
    assert r"| original model | " in card and r"ba\`se" in card
    assert not re.search(r"(?<!\\)<img", re.sub("(`{2,}) .*? \\1", "", card))


def test_the_figures_of_a_run_that_went_back_are_those_of_the_step_it_went_back_to(runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs / "full/run", run)
    (run / "evaluation.json").unlink()
    policy, _ = open_tuned(*open_run("", str(run)), "cpu")
    for step, told in ((1, "that of step 1: reward"), (0, "A run that was not evaluated.")):
        save_policy(policy, load_tokenizer(str(run)), run, RolloutSettings(top_p=0.5), step=step)
        shutil.rmtree(tmp_path / "to", ignore_errors=True)
        assert run_here(export.main, run, "--what", "full", "--to", tmp_path / "to") == 0
        assert told in (tmp_path / "to/README.md").read_text()


def test_an_uploaded_card_has_the_name_it_is_loaded_by_and_no_path_of_this_machine(
    runs, tmp_path, monkeypatch, recwarn
):
    monkeypatch.setattr(export, "check_login", lambda _name: None)
    run = runs / "positive/run"
    to = ["--to", str(tmp_path / "to"), "--push-to-hub", "me/positive"]
    with pytest.raises(ExportError, match="which others do not have"):
        planned(run, "--what", "adapter", "--base", "/models/elsewhere", *to)
    _, config = open_run("", str(run))
    write_export(planned(run, "--what", "merged", *to), config, "a command")
    card = (tmp_path / "to/README.md").read_text()
    assert "\n# me/positive\n" in card and 'from_pretrained("me/positive")' in card and "base_model:" not in card
    write_export(
        planned(run, "--what", "adapter", "--base", "/models/elsewhere", "--to", str(tmp_path / "moved")), config, "a"
    )
    card = (tmp_path / "moved/README.md").read_text()
    assert "base_model:" not in card and "The base is a folder of one machine" in card
    assert not [warning for warning in recwarn if "config file" in str(warning.message)]


def planned(run: Path, *options: str) -> Export:
    asked = export.parse([str(run), *options])
    return export.plan(*open_run("", asked.run), asked)


def test_a_hub_name_stays_a_folder_becomes_absolute_and_another_name_wins(runs, tmp_path, monkeypatch, base):
    run = runs / "positive/run"
    options = ["--what", "adapter", "--to", str(tmp_path / "to")]
    assert planned(run, *options, "--base", "you/base").base == "you/base"
    monkeypatch.chdir(base.parent)
    for path, name in (("me/base", "me/base"), (base.name, str(base.resolve()))):
        folder, config = open_run("", str(run), ["--model_path", path])
        assert export.plan(folder, config, export.parse([str(run), *options])).base == name


@pytest.mark.parametrize(
    ("run", "options", "message"),
    [
        ("full", ["--what", "adapter"], "trained the whole model, without LoRA; use --what full"),
        ("full", ["--what", "merged"], "trained the whole model, without LoRA; use --what full"),
        ("positive", ["--what", "full"], "--what merged gives the whole model"),
        ("positive", ["--what", "merged", "--base", "x"], "only an adapter names its base"),
        ("positive", ["--what", "adapter", "--push-to-hub", "me/x"], "which others do not have; name it as it is on"),
        ("positive", ["--what", "merged", "--push-to-hub", "me/x"], "not logged in; run `hf auth login`"),
        ("positive", ["--what", "merged", "--push-to-hub", "not a name"], "--push-to-hub not a name: "),
        ("positive", ["--what", "merged", "--to", "."], "--to .: it exists and is not an empty folder elsewhere"),
    ],
)
def test_what_cannot_be_is_refused_with_its_remedy_and_nothing_is_written(
    runs, tmp_path, monkeypatch, run, options, message
):
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no token"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ExportError, match=re.escape(message)):
        planned(runs / run / "run", "--to", str(tmp_path / "to"), *options)
    assert list(tmp_path.iterdir()) == []


def test_other_faults_are_one_line_and_leave_nothing(runs, tmp_path, capsys):
    def refused(run: Path, to: Path, what: str = "merged") -> str:
        assert run_here(export.main, run, "--what", what, "--to", to) == 2
        return capsys.readouterr().err

    assert "it exists and is not an empty folder elsewhere; name a new one" in refused(runs / "positive/run", runs)
    assert "is not a run: it has no config.yaml" in refused(tmp_path / "nowhere", tmp_path / "to")
    (tmp_path / "unfinished").mkdir()
    settings = (runs / "positive/run/config.yaml").read_text()
    (tmp_path / "unfinished/config.yaml").write_text(settings)
    assert "or one of its checkpoints: " in refused(tmp_path / "unfinished", tmp_path / "to")
    damaged = tmp_path / "step_000003"
    damaged.mkdir()
    for path in (runs / "positive/run/checkpoints/step_000003").iterdir():
        content = path.read_bytes()
        (damaged / path.name).write_bytes(content[:-1] if path.name == "trainable.safetensors" else content)
    assert "trainable.safetensors has" in refused(damaged, tmp_path / "to")
    content = (runs / "positive/run/checkpoints/step_000003/trainable.safetensors").read_bytes()
    (damaged / "trainable.safetensors").write_bytes(content)
    (damaged / "config.yaml").write_text(settings.replace("lora_r: 4", "lora_r: 2"))
    seal = json.loads((damaged / "checkpoint.json").read_text())
    del seal["files"]["config.yaml"]
    (damaged / "checkpoint.json").write_text(json.dumps(seal))
    assert "the checkpoint is of another model: " in refused(damaged, tmp_path / "to")
    assert not (tmp_path / "to").exists() and not (tmp_path / ".to.writing").exists()


@pytest.mark.filterwarnings("ignore:Model with `tie_word", "ignore:Model has `tie_word")
def test_files_that_say_something_else_than_the_policy_are_not_kept(runs, tmp_path, monkeypatch):
    # An adapter on a head that is the embedding too: folded in, it changes what the model reads as well.
    run, config = open_run("", str(runs / "positive/run"))
    original = AutoModelForCausalLM.from_pretrained(config.model.model_path)
    model = get_peft_model(
        original, LoraConfig(task_type="CAUSAL_LM", target_modules=["lm_head"], init_lora_weights=False)
    )
    for path in run.iterdir():
        if path.is_file() and not path.name.startswith("adapter"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    with pytest.raises(ExportError, match="so they were not kept"):
        write_export(Export(tmp_path, "merged", tmp_path / "to", None, "to"), config, "a command")
    assert not (tmp_path / "to").exists() and not (tmp_path / ".to.writing").exists()
