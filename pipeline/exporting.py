"""From a run to a folder others can load: the files, the proof that they say what the policy says, the card."""

import importlib.metadata
import json
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import DatasetCard, ModelCard, ModelCardData
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from pipeline.assembly import open_tuned
from pipeline.config import Config, RolloutSettings
from pipeline.data.sources import PACKAGE
from pipeline.errors import UserError
from pipeline.evaluation import Evaluation, figures_table
from pipeline.foreign_text import markdown_block, markdown_code, markdown_text, without_secrets
from pipeline.models.card import markdown_table, stated_licence, write_card
from pipeline.models.saving import save_causal_lm, saved_step
from pipeline.models.vocabulary import load_config_and_tokenizer
from pipeline.rewards.terms import SENTIMENT, parse_terms
from pipeline.run_directory import EVALUATION_FILE, METRICS_FILE
from pipeline.runtime.checkpoints import is_checkpoint

TOLERANCE = 1e-4  # of the largest logit, or of 1: merging rounds, and everything worse is a fault


class ExportError(UserError, ValueError):
    """What was asked cannot be exported; the message names the argument and the remedy."""


@dataclass(frozen=True)
class Export:
    """What goes where."""

    run: Path  # or a checkpoint
    what: str  # adapter, merged or full
    directory: Path
    base: str | None  # under which name an adapter's base will be found
    name: str  # of the folder, for its users


def write_export(export: Export, config: Config, command: str) -> float:
    """Write the folder, whole or not at all; returns how far its logits are from the trained policy's, at most.

    `command` is what the card says the folder was made by.

    Raises:
        ModelError, CheckpointError: see `open_tuned`.
        ExportError: the disk is full, or the files say something else than the policy.
    """
    _, tokenizer = load_config_and_tokenizer(config.model.model_path)
    policy, _ = open_tuned(export.run, config, "cpu")
    model = policy.model
    length = min(32, getattr(model.config, "max_position_embeddings", 32))
    probe = torch.randint(model.config.vocab_size, (4, length), generator=torch.Generator().manual_seed(0))
    expected = _logits(model, probe)
    if export.what == "adapter":
        model.peft_config["default"].base_model_name_or_path = export.base
    elif export.what == "merged":
        model = model.merge_and_unload(safe_merge=True, adapter_names=["default"])
    aside = export.directory.with_name(f".{export.directory.name}.writing")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        with warnings.catch_warnings():  # an adapter's base need not be found from here
            warnings.filterwarnings("ignore", "Could not find a config file")
            save_causal_lm(model, tokenizer, aside, config.rollout)
        difference = (_logits(_reloaded(aside, export, config), probe) - expected).abs().max().item()
        if not difference <= TOLERANCE * max(1.0, expected.abs().max().item()):
            raise ExportError(
                f"--what {export.what}: the files' logits differ by {difference:.2g} from the policy's, so they were "
                f"not kept. Adapters on a head that is the embedding too cannot be merged: export --what adapter."
            )
        _write_card(aside, export, config, command, difference)
        aside.replace(export.directory)
    except OSError as error:
        raise ExportError(f"--to {export.directory} cannot be written: {error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return difference


@torch.no_grad()
def _logits(model: nn.Module, tokens: Tensor) -> Tensor:
    return model(input_ids=tokens).logits


def _reloaded(folder: Path, export: Export, config: Config) -> nn.Module:
    """The export as its users load it."""
    if export.what != "adapter":
        return AutoModelForCausalLM.from_pretrained(folder).eval()
    base = AutoModelForCausalLM.from_pretrained(config.model.model_path, dtype=torch.float32)
    return PeftModel.from_pretrained(base, folder).eval()


def _write_card(folder: Path, export: Export, config: Config, command: str, difference: float) -> None:
    base, dataset, start = config.model.model_path, config.data.dataset, config.model.adapter_path
    began_with = "" if start is None else markdown_code(start)
    kinds = {"adapter": "A LoRA adapter of", "merged": "With its LoRA adapter folded in,", "full": "Fine-tuned whole,"}
    metadata = ModelCardData(
        base_model=None if is_path(export.base or base) else export.base or base,
        library_name="peft" if export.what == "adapter" else "transformers",
        pipeline_tag="text-generation",
        tags=["ppo", "rlhf"],
    )
    sections = {
        "Load it": _loading(export),
        "Training": _training(config),
        "Figures": _figures(export.run)
        + (f"\n\n“Before” and the original are here the base with the adapter {began_with}." if start else ""),
        "Licences": f"- Base model {markdown_code(base)}: "
        f"{markdown_text(stated_licence(base, ModelCard) or 'unknown: its card states none.')}\n"
        f"- Data {markdown_code(dataset)}: {markdown_text(_data_licence(dataset))}\n\n"
        "Both bear on what may be done with this model. Nothing is said here of the licence of the model itself.",
        "Limits": "PPO makes a model say what its reward likes, right or wrong: it is as good as its reward, and finds "
        "what that overrates. Errors and prejudices of the base model are still there.",
        "Made by": f"{markdown_block(command)}\n\nRead back in float32, the logits of these files are within "
        f"{difference:.1e} of the trained policy's.",
    }
    began = f" from the adapter {began_with} on" if start else ""
    summary = (
        f"{kinds[export.what]} {markdown_code(export.base or base)}, trained{began} with PPO to please a reward and "
        f"stay close to what it began as."
    )
    write_card(folder, export.name, summary, sections, metadata)


def _loading(export: Export) -> str:
    name = json.dumps(export.name, ensure_ascii=False)  # as Python has it too
    imports = "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
    if export.what != "adapter":
        return markdown_block(
            f"{imports}model = AutoModelForCausalLM.from_pretrained({name})\n"
            f"tokenizer = AutoTokenizer.from_pretrained({name})",
            "python",
        )
    base = json.dumps(export.base, ensure_ascii=False)
    code = markdown_block(
        f"import torch\nfrom peft import PeftModel\n{imports}"
        f"base = AutoModelForCausalLM.from_pretrained({base}, dtype=torch.float32)\n"
        f"model = PeftModel.from_pretrained(base, {name})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({name})",
        "python",
    )
    code += (
        "\n\nThe adapter was trained on the base in float32; without `dtype` a base stored in bfloat16 stays so, and "
        "the answers are a little off."
    )
    if not is_path(export.base):
        return code
    return (
        f"{code}\n\nThe base is a folder of one machine, and `adapter_config.json` names it so. "
        f"Elsewhere load the base from where it lies there; PEFT does not look at the name then."
    )


def _training(config: Config) -> str:
    model, data, reward, ppo = config.model, config.data, config.reward, config.ppo
    terms = parse_terms(reward.reward)
    settings = {
        "original model": model.model_path,
        "starting from the adapter": model.adapter_path,
        "LoRA": f"rank {model.lora_r}, alpha {model.lora_alpha}" if model.use_peft and not model.adapter_path else None,
        "prompts": f"{data.prompt_min_tokens} to {data.prompt_max_tokens} tokens of {data.dataset}",
        "reward": " + ".join(f"{term.weight:g} {without_secrets(term.source)}" for term in terms),
        "sentiment": f"{reward.reward_label} of {reward.reward_model_path}, as {reward.reward_scale}"
        if any(term.source == SENTIMENT for term in terms)
        else None,
        "steps planned, of samples": f"{ppo.steps} of {config.rollout.rollout_batch_size}",
        "responses": _sampling(config.rollout),
        "learning rate": f"{ppo.learning_rate:g}",
        "KL coefficient": f"{ppo.kl_coef:g}{' at first, adaptive' if ppo.kl_adaptive else ''}",
        "seed": str(config.run.seed),
    }
    return markdown_table([["", ""], *([name, value] for name, value in settings.items() if value is not None)])


def _sampling(rollout: RolloutSettings) -> str:
    limits = {
        f"top-k {rollout.top_k}": rollout.top_k > 0,
        f"top-p {rollout.top_p:g}": rollout.top_p < 1,
        f"no end before {rollout.eos_min_tokens} tokens": rollout.eos_min_tokens > 0,
    }
    told = [f"at most {rollout.response_max_tokens} tokens", f"temperature {rollout.temperature:g}"]
    return ", ".join([*told, *(limit for limit, holds in limits.items() if holds)])


def is_path(name: str) -> bool:
    """Whether a model's name is a folder's, of this machine or another one, and not the Hub's."""
    return Path(name).is_dir() or name.startswith(("/", ".", "~")) or name.count("/") > 1


def _figures(run: Path) -> str:
    evaluation = run / EVALUATION_FILE
    if evaluation.is_file():
        figures = without_secrets(json.loads(evaluation.read_text(encoding="utf-8")))
        return markdown_table(figures_table(Evaluation(figures, [])))
    steps = (run / METRICS_FILE).read_text(encoding="utf-8").splitlines() if (run / METRICS_FILE).is_file() else []
    what = "A checkpoint" if is_checkpoint(run) else "A run"
    done = saved_step(run)
    done = len(steps) if done is None else done
    if not 0 < done <= len(steps):
        return f"{what} that was not evaluated."
    last = json.loads(steps[done - 1])
    return (
        f"{what} that was not evaluated on held-out prompts. Its last training batch, that of step {last['step']}: "
        f"reward {last['reward/mean']:.3f}, KL from the original {last['kl/sequence_k1']:.2f} nats a response."
    )


def _data_licence(dataset: str) -> str:
    if dataset.partition("/")[0] == PACKAGE:
        stated = importlib.metadata.metadata(PACKAGE).get("License") or "none"
        return f"the pip package states {stated}; of the rights in the reviews themselves it says nothing: unknown."
    return stated_licence(dataset, DatasetCard) or "unknown: no card states one."
