"""From a recipe to the parts of a run, cheap checks first."""

import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch
from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from pipeline.config import SECTIONS, Config, ConfigError
from pipeline.data.prompts import Openings, make_openings
from pipeline.data.sources import load_reviews
from pipeline.data.tokens import prefix_ids, prompt_text
from pipeline.frontiers import Frontier, check_belongs, find_frontier, identity_of, load_frontier
from pipeline.inputs import check_same_start
from pipeline.models.building import build_policy_and_reference, load_tuned
from pipeline.models.forward import layout_of
from pipeline.models.loading import LoraSettings, check_context
from pipeline.models.policy import Policy, Reference
from pipeline.models.vocabulary import load_config_and_tokenizer
from pipeline.rewards.composed import ComposedReward
from pipeline.rewards.loading import check_terms, load_reward
from pipeline.rewards.terms import length_range, parse_terms
from pipeline.rollout.sampling import sampling_options
from pipeline.rollout.sizing import largest_microbatch
from pipeline.rollout.trial import check_sampling
from pipeline.run_directory import CONFIG_FILE
from pipeline.runtime.checkpoints import is_checkpoint, restore_trained, trained_weights
from pipeline.runtime.command import parse_recipe, split_recipe
from pipeline.runtime.distributed import agreed_minimum, free_memory_bytes
from pipeline.runtime.engine import moving_weights, precision, strategy

# The bars of the libraries would tear the run's own.
transformers_logging.disable_progress_bar()
datasets.disable_progress_bars()
# What the libraries, whose versions are pinned, call outdated in each other is not for who runs this to mend.
if not sys.warnoptions:
    warnings.simplefilter("ignore", FutureWarning)


@dataclass(frozen=True)
class Data:
    """Tokenizer and prompts of a run."""

    tokenizer: PreTrainedTokenizerBase
    training: Openings
    held_out: Openings


@dataclass(frozen=True)
class Parts:
    """Models and reward of a run, on the worker's device."""

    policy: Policy
    reference: Reference
    reward: ComposedReward
    frontier: Frontier | None  # of this recipe, where one is given


def parse_config(description: str, arguments: Sequence[str] | None = None) -> Config:
    """Read recipe and command line; `output_dir` becomes runs/<recipe name> where it is not set.

    Raises:
        ConfigError: a value makes no sense.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    config = Config(*parse_recipe(SECTIONS, description, arguments))
    if config.run.output_dir is None:
        _, recipe = split_recipe(arguments)
        config.run.output_dir = str(Path("runs") / Path(recipe or "run").stem)
    return config


def open_run(description: str, path: str, settings: Sequence[str] = ()) -> tuple[Path, Config]:
    """The folder of a run, or of one of its checkpoints, and its recipe, over which `settings` win.

    Raises:
        ConfigError: there is none, or a setting makes no sense.
    """
    folder = Path(path)
    if not (folder / CONFIG_FILE).is_file():
        raise ConfigError(f"{path!r} is not a run: it has no {CONFIG_FILE}.")
    return folder, parse_config(description, ["--config", str(folder / CONFIG_FILE), *settings])


def open_tuned(folder: Path, config: Config, device: torch.device | str) -> tuple[Policy, Reference]:
    """What a run, or one of its checkpoints, made of its model; and the model it started from.

    Raises:
        ModelError, CheckpointError: a model cannot be opened, the run holds none yet, the checkpoint is damaged.
        ConfigError: the model it started from has other weights by now.
    """
    check_same_start(folder, config)
    model = config.model
    if is_checkpoint(folder):
        weights = trained_weights(folder)
        policy, reference = open_start(config, device, lora=_lora(config))
        restore_trained(policy, weights)
        layout_of(policy.model, f"the policy of {folder}")  # whether its logits are numbers still
        return policy, reference
    policy, reference = load_tuned(
        model.model_path, folder, use_peft=model.use_peft, adapter_path=model.adapter_path, device=device
    )
    check_sampling(policy, model.model_path)
    return policy, reference


def open_start(
    config: Config, device: torch.device | str, *, lora: LoraSettings | None = None
) -> tuple[Policy, Reference]:
    """The policy as training starts with it, and the reference; without `lora` both are the model as it is.

    Raises:
        ModelError: see `build_policy_and_reference` and `check_sampling`.
    """
    model = config.model
    policy, reference = build_policy_and_reference(
        model.model_path, lora=lora, adapter_path=model.adapter_path, device=device
    )
    check_sampling(policy, model.model_path)
    return policy, reference


def _lora(config: Config) -> LoraSettings | None:
    model = config.model
    if not model.use_peft:
        return None
    return LoraSettings(model.lora_r, model.lora_alpha, model.lora_target_modules, config.run.seed)


def open_data(config: Config) -> Data:
    """Check what can be checked without weights, then read the reviews and cut the openings.

    Raises:
        ConfigError, ModelError, RewardError, DataError: before any model is loaded.
    """
    model_config, tokenizer = load_config_and_tokenizer(config.model.model_path)
    check_context(
        model_config,
        config.data.prompt_max_tokens,
        config.rollout.response_max_tokens,
        len(prefix_ids(tokenizer)),
    )
    check_terms(
        parse_terms(config.reward.reward),
        model_path=config.reward.reward_model_path,
        label=config.reward.reward_label,
    )
    reviews = load_reviews(config.data.dataset, split=config.data.dataset_split, text_column=config.data.text_column)
    training, held_out = make_openings(
        reviews,
        tokenizer,
        min_characters=config.data.min_review_characters,
        max_tokens=config.data.prompt_max_tokens,
    )
    return Data(tokenizer, training, held_out)


def open_reward(config: Config, data: Data, device: torch.device) -> ComposedReward:
    """Load the reward and try it on two openings, so that a fault in it shows before the policy is loaded.

    Raises:
        RewardError, ModelError: see `load_reward` and `checked_scores`.
    """
    reward = make_reward(config, device)
    half = max(1, config.data.prompt_max_tokens // 2)
    rows = data.training.tokens[:2, data.training.prefix_tokens :]
    prompts = [prompt_text(data.tokenizer, row[:half]) for row in rows]
    responses = [data.tokenizer.decode(row[half:], skip_special_tokens=True) for row in rows]
    reward.try_texts(prompts, responses)
    return reward


def make_reward(config: Config, device: torch.device | str) -> ComposedReward:
    """Load what the recipe rewards; raises as `load_reward`."""
    return load_reward(
        parse_terms(config.reward.reward),
        model_path=config.reward.reward_model_path,
        label=config.reward.reward_label,
        scale=config.reward.reward_scale,
        batch_size=config.reward.reward_batch_size,
        timeout=config.reward.reward_timeout,
        whitening=config.reward.reward_whitening,
        device=device,
    )


def build_parts(config: Config, data: Data, device: torch.device) -> Parts:
    """Load reward, policy and reference onto `device`; raises as `open_reward` and `build_policy_and_reference` do."""
    if config.run.frontier not in ("none", "auto"):
        load_frontier(Path(config.run.frontier))  # a fault in the file shows before a model is loaded
    reward = open_reward(config, data, device)
    policy, reference = open_start(config, device, lora=_lora(config))
    return Parts(policy, reference, reward, open_frontier(config, data, reference))


def open_frontier(config: Config, data: Data, reference: Reference) -> Frontier | None:
    """The recipe's frontier, if any; raises `ConfigError` where a named one cannot be read or is another recipe's."""
    if config.run.frontier == "none":
        return None
    if config.run.frontier == "auto":
        return find_frontier(config, reference, data.held_out)
    frontier = load_frontier(Path(config.run.frontier))
    check_belongs(frontier, identity_of(config, reference, data.held_out), config.run.frontier)
    return frontier


def choose_rollout_microbatch(config: Config, accelerator: Accelerator, policy: Policy, samples: int) -> None:
    """Set `rollout_microbatch_size` where the recipe leaves it open, to one number on all workers: collective.

    Args:
        samples: sequences of the largest batch, over all workers.
    """
    if config.rollout.rollout_microbatch_size is not None:
        return
    device, lowered = accelerator.device, precision(accelerator) != "no"
    graphs = device.type == "cuda" and moving_weights(accelerator) is None
    chosen = largest_microbatch(
        policy.config,
        -(-samples // accelerator.num_processes),
        config.data.prompt_max_tokens + config.rollout.response_max_tokens,
        free_bytes=free_memory_bytes(device) - bytes_to_come(policy, strategy(accelerator), copies=lowered and graphs),
        itemsize=2 if lowered else 4,
        on_cpu=device.type == "cpu",
        graphs=graphs,
    )
    config.rollout.rollout_microbatch_size = agreed_minimum(accelerator, chosen)


def bytes_to_come(policy: torch.nn.Module, strategy: str, *, copies: bool) -> int:
    """What training will allocate beside the weights, for each worker.

    Args:
        strategy: see `runtime/engine.py`.
        copies: whether graphs keep lowered copies of the weights.
    """
    trainable = sum(parameter.numel() for parameter in policy.parameters() if parameter.requires_grad)
    everything = sum(parameter.numel() for parameter in policy.parameters())
    per_trainable = 4 + 8 + (4 if strategy == "ddp" else 0)  # gradient, Adam's moments, the buckets of data parallelism
    return per_trainable * trainable + (2 * everything if copies else 0)


def config_warnings(config: Config) -> list[str]:
    """What to tell a user whose settings are allowed and do something else than they seem to."""
    told = []
    if not sampling_options(config.rollout).is_pure:
        told.append(
            "top_k, top_p or eos_min_tokens restrict the sampling: log-probs and KL are still those of the "
            "unrestricted distribution, so the KL reported and penalised is not that of the samples."
        )
    if config.ppo.clip_range >= 1:
        told.append(
            f"clip_range={config.ppo.clip_range:g} clips no ratio that falls, since none is below 0: only "
            f"kl_early_stop and the guards hold an update back; 0.2 is usual."
        )
    for term in parse_terms(config.reward.reward):
        if term.kind == "length" and length_range(term.source)[0] > config.rollout.response_max_tokens:
            told.append(
                f"reward={term.source!r} wants longer responses than response_max_tokens="
                f"{config.rollout.response_max_tokens} allows: none reaches the range."
            )
    return told
