"""The best reward at each KL, for a recipe's reference, reward and prompts; and how far from it a run ended.

The optimum's estimate is `ppo/optimum.py`'s; here are the samples it is made of, its intervals, and its file.
"""

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pipeline.config import Config, ConfigError
from pipeline.data.prompts import Openings, PromptBatch, prompt_batch
from pipeline.models.loading import REFERENCE_ADAPTER
from pipeline.models.policy import Reference
from pipeline.ppo.optimum import kl_at, optimum
from pipeline.rewards.protocol import Reward, checked_scores
from pipeline.rollout.rollout import response_texts, sample_responses
from pipeline.rollout.sampling import sampling_noise
from pipeline.runtime.distributed import all_or_none, share
from pipeline.runtime.engine import autocast
from pipeline.trainer import sampling_options

SEED = 20261  # of the samples; not the evaluation's, whose own noise is not to be judged by itself
PRICES = 60  # points of the curve
ENOUGH_SAMPLES = 10.0  # effective ones, in nine of ten prompts, for a point to be trusted
RESAMPLES = 2000

# What a frontier is the frontier of.
SETTINGS = (
    "model_path", "adapter_path", "dataset", "dataset_split", "text_column", "min_review_characters",
    "prompt_min_tokens", "prompt_max_tokens", "response_min_tokens", "response_max_tokens", "temperature", "top_k",
    "top_p", "eos_min_tokens", "reward", "reward_model_path", "reward_label", "reward_scale",
)  # fmt: skip


@dataclass(frozen=True)
class Frontier:
    """Curves of n prompts over B falling prices of KL: reward and KL rise along them."""

    prices: np.ndarray  # (B,) units of reward a nat
    rewards: np.ndarray  # (n, B)
    kls: np.ndarray  # (n, B) nats
    effective_samples: np.ndarray  # (n, B)
    samples: int  # of the reference for each prompt
    identity: dict[str, object]  # what it belongs to: the settings, and a fingerprint of the reference's weights

    @property
    def trusted(self) -> np.ndarray:
        """Which points (B,) rest on enough samples."""
        return np.quantile(self.effective_samples, 0.1, axis=0) >= ENOUGH_SAMPLES

    def kl_needed(self, reward: float) -> tuple[float, float, float]:
        """The smallest KL that has `reward`, with its 95 % interval over prompts; NaN where it is not known.

        That is beyond the trusted points. Rewards below the reference's own need none.
        """
        draws = self.resampled_kl_needed(np.full(RESAMPLES, reward))
        low, high = np.quantile(draws, [0.025, 0.975]) if not np.isnan(draws).any() else (math.nan, math.nan)
        return self._needed(np.array([reward]), self.rewards.mean(0)[None], self.kls.mean(0)[None])[0], low, high

    def resampled_kl_needed(self, rewards: np.ndarray) -> np.ndarray:
        """`kl_needed` of each reward (D,) with prompts drawn anew for each of them."""
        draws = np.random.default_rng(SEED).integers(len(self.rewards), size=(len(rewards), len(self.rewards)))
        curves = [np.stack([values[draw].mean(0) for draw in draws]) for values in (self.rewards, self.kls)]
        return self._needed(rewards, *curves)

    def _needed(self, rewards: np.ndarray, curves: np.ndarray, kls: np.ndarray) -> np.ndarray:
        last = int(self.trusted.sum())
        curves, kls = (torch.from_numpy(values[:, :last]) for values in (curves, kls))
        needed = torch.stack([kl_at(float(r), c, k) for r, c, k in zip(rewards, curves, kls, strict=True)]).numpy()
        return np.where(rewards <= curves[:, 0].numpy(), 0.0, needed)

    def save(self, path: Path) -> None:
        """Write it as JSON, curves with five digits."""
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "identity": self.identity,
            "samples": self.samples,
            "trusted": int(self.trusted.sum()),
            "prices": _digits(self.prices),
            "rewards": _digits(self.rewards),
            "kls": _digits(self.kls),
            "effective_samples": _digits(self.effective_samples),
        }
        path.write_text(json.dumps(content) + "\n", encoding="utf-8")


def load_frontier(path: Path) -> Frontier:
    """Read what `Frontier.save` wrote; raises `ConfigError` where it cannot."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        arrays = [np.array(content[name]) for name in ("prices", "rewards", "kls", "effective_samples")]
        return Frontier(*arrays, content["samples"], content["identity"])
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"frontier={str(path)!r} cannot be read ({error}); make it with: "
            f"python -m pipeline.frontier --config … --frontier {path}"
        ) from error


def identity_of(config: Config, reference: Reference) -> dict[str, object]:
    """What a frontier of this recipe belongs to; reads the reference's weights once, whatever they are wrapped in."""
    settings = config.as_dict()
    with reference.activated() as model:
        own = [p for name, p in model.named_parameters() if "lora_" not in name or f".{REFERENCE_ADAPTER}." in name]
        digests = sorted(hashlib.sha256(p.detach().cpu().contiguous().numpy()).hexdigest() for p in own)
    whole = hashlib.sha256("".join(digests).encode()).hexdigest()
    return {name: settings[name] for name in SETTINGS} | {"reference_weights": whole[:16]}


def check_belongs(frontier: Frontier, identity: dict[str, object], path: str) -> None:
    """Raise `ConfigError` with what differs where the frontier is another reference's, reward's or prompts'."""
    different = {
        name: (frontier.identity.get(name), value)
        for name, value in identity.items()
        if frontier.identity.get(name) != value
    }
    if different:
        told = "; ".join(f"{name} is {theirs!r} there and {ours!r} here" for name, (theirs, ours) in different.items())
        raise ConfigError(
            f"frontier={path!r} belongs to another recipe: {told}. Make one of this recipe, or leave it out."
        )


def estimate_frontier(
    accelerator: Accelerator,
    reference: Reference,
    reward: Reward,
    tokenizer: PreTrainedTokenizerBase,
    held_out: Openings,
    config: Config,
) -> Frontier:
    """Sample the reference for held-out prompts, each worker its share of the samples; the same result on all.

    Raises:
        RewardError: the reward broke its contract on some response.
    """
    count = min(config.run.frontier_prompts, len(held_out))
    samples = math.ceil(config.run.frontier_samples / accelerator.num_processes) * accelerator.num_processes
    prompts = prompt_batch(
        held_out, tokenizer, step=0, batch_size=count, min_tokens=config.data.prompt_min_tokens,
        max_tokens=config.data.prompt_max_tokens, pad_token_id=tokenizer.pad_token_id, seed=SEED,
    )  # fmt: skip
    mine = share(accelerator, samples)
    rounds = [
        _scores(accelerator, reference, reward, tokenizer, prompts, config, number) for number in range(samples)[mine]
    ]
    scores = torch.stack(rounds, 0).to(accelerator.device)  # (samples of this worker, n)
    scores = (accelerator.gather(scores) if accelerator.num_processes > 1 else scores).cpu().double().T
    spread = float((scores - scores.mean(1, keepdim=True)).square().mean().sqrt()) or 1.0
    prices = spread * torch.logspace(1, -2, PRICES, dtype=torch.float64)  # from hardly any KL to one sample's
    best = optimum(scores, prices)
    arrays = (prices, best.reward.T, best.kl.T, best.effective_samples.T)
    return Frontier(*(x.numpy() for x in arrays), samples, identity_of(config, reference))


def _scores(
    accelerator: Accelerator,
    reference: Reference,
    reward: Reward,
    tokenizer: PreTrainedTokenizerBase,
    prompts: PromptBatch,
    config: Config,
    number: int,
) -> Tensor:
    """Scores (n,) of one response of the reference to each prompt."""
    rollout = config.rollout
    uniforms, lengths = sampling_noise(
        SEED, number, len(prompts), rollout.response_min_tokens, rollout.response_max_tokens
    )
    with reference.activated() as model, autocast(accelerator):
        responses, _ = sample_responses(
            model, prompts, uniforms, lengths, microbatch_size=rollout.rollout_microbatch_size,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, options=sampling_options(config),
        )  # fmt: skip
        texts = response_texts(responses, prompts.text, tokenizer)
        return all_or_none(accelerator, lambda: checked_scores(reward, prompts.text, texts))


def overspend(frontier: Frontier, scores: np.ndarray, kls: np.ndarray) -> dict[str, object]:
    """How much more KL a policy spent than the optimum with its reward needs; 1 is perfect.

    Args:
        scores, kls: (n,) of one response to each of n held-out prompts.

    Returns:
        reward, kl, kl_needed with ci95, kl_overspend with ci95; instead of the last two `beyond`, a sentence, where the
        reward is more than the frontier's samples can tell of.
    """
    needed, low, high = frontier.kl_needed(float(scores.mean()))
    figures: dict[str, object] = {"reward": float(scores.mean()), "kl": float(kls.mean())}
    draws = np.random.default_rng(SEED + 1).integers(len(scores), size=(RESAMPLES, len(scores)))
    ratios = kls[draws].mean(1) / np.maximum(frontier.resampled_kl_needed(scores[draws].mean(1)), 1e-6)
    if math.isnan(needed) or math.isnan(low) or np.isnan(ratios).mean() > 0.025:
        last = frontier.rewards.mean(0)[int(frontier.trusted.sum()) - 1]
        return figures | {
            "beyond": f"the reward {scores.mean():.3f} is at or beyond {last:.3f}, the most that "
            f"{frontier.samples} samples a prompt can tell of"
        }
    return figures | {
        "kl_needed": float(needed),
        "kl_needed_ci95": [float(low), float(high)],
        "kl_overspend": float(kls.mean() / max(needed, 1e-6)),
        "kl_overspend_ci95": [float(x) for x in np.nanquantile(ratios, [0.025, 0.975])],
    }


def _digits(values: np.ndarray) -> object:
    return json.loads(json.dumps(values.tolist()), parse_float=lambda text: float(f"{float(text):.5g}"))
