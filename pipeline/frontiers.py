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
from pipeline.models.loading import REFERENCE_ADAPTER, first_token_id
from pipeline.models.policy import Reference
from pipeline.ppo.optimum import kl_at, optimum
from pipeline.rewards.composed import ComposedReward
from pipeline.rewards.reading import read
from pipeline.rollout.rollout import response_texts, sample_responses
from pipeline.rollout.sampling import sampling_noise, sampling_options
from pipeline.runtime.distributed import all_or_none, share
from pipeline.runtime.engine import autocast

SEED = 20261  # of the samples; not the evaluation's, whose own noise is not to be judged by itself
PRICES = 60  # points of the curve
# A point is trusted with as many effective samples after so many of the prompts; log Z is then too low by about half
# their inverse, in nats.
ENOUGH_SAMPLES, TRUSTED_SHARE = 7.0, 0.9
SPARE = 1.2  # how many more are aimed at
STAGES = 4  # of the sampling: after each it is seen where samples are missing
RESAMPLES = 2000
DIRECTORIES = (
    Path("runs/frontiers"),
    Path("assets/frontiers"),
)  # a recipe's own: made here, shipped

# What a frontier is the frontier of.
SETTINGS = (
    "model_path", "adapter_path", "dataset", "dataset_split", "text_column", "min_review_characters",
    "prompt_min_tokens", "prompt_max_tokens", "response_min_tokens", "response_max_tokens", "temperature", "top_k",
    "top_p", "eos_min_tokens", "reward", "reward_model_path", "reward_label", "reward_scale", "reward_whitening",
)  # fmt: skip


@dataclass(frozen=True)
class Frontier:
    """Curves of n prompts over B falling prices of KL: reward and KL rise along them."""

    prices: np.ndarray  # (B,) units of reward a nat
    rewards: np.ndarray  # (n, B)
    kls: np.ndarray  # (n, B) nats
    effective_samples: np.ndarray  # (n, B)
    samples: int  # of the reference for each prompt, in the mean
    identity: dict[str, object]  # what it belongs to: the settings, and a fingerprint of the reference's weights

    @property
    def trusted(self) -> np.ndarray:
        """Which points (B,) rest on enough samples."""
        return np.quantile(self.effective_samples, 1 - TRUSTED_SHARE, axis=0) >= ENOUGH_SAMPLES

    def kl_needed(self, reward: float) -> tuple[float, float, float]:
        """The smallest KL that has `reward`, with its 95 % interval over prompts; NaN where it is not known.

        That is beyond the trusted points. Rewards below the reference's own need none.
        """
        draws = self.resampled_kl_needed(np.full(RESAMPLES, reward))
        low, high = np.quantile(draws, [0.025, 0.975]) if not np.isnan(draws).any() else (math.nan, math.nan)
        last = int(self.trusted.sum())
        curve = (x.mean(0)[None, :last] for x in (self.rewards, self.kls))
        return _needed(np.array([reward]), *curve)[0], low, high

    def resampled_kl_needed(self, rewards: np.ndarray) -> np.ndarray:
        """The KL each reward (D,) needs with prompts drawn anew for it, be it beyond the trusted points."""
        return _needed(rewards, *self._resampled(len(rewards)))

    def band(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The trusted curve as a figure shows it: rewards (b,), and the 95 % interval of the KL they need.

        NaN where the prompts drawn anew do not always reach the reward.
        """
        rewards = self.rewards.mean(0)[self.trusted]
        curves = self._resampled(RESAMPLES)
        needed = [_needed(np.full(RESAMPLES, reward), *curves) for reward in rewards]
        low, high = np.quantile(np.stack(needed), [0.025, 0.975], axis=1)
        return rewards, low, high

    def _resampled(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Mean rewards and KLs (count, B) of prompts drawn anew."""
        prompts = len(self.rewards)
        times = np.random.default_rng(SEED).multinomial(prompts, np.full(prompts, 1 / prompts), size=count) / prompts
        return times @ self.rewards, times @ self.kls

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


def _needed(rewards: np.ndarray, curves: np.ndarray, kls: np.ndarray) -> np.ndarray:
    """The KL (D,) at which each of the curves (D, B) has its reward (D,); NaN beyond its end."""
    needed = kl_at(*(torch.from_numpy(values) for values in (rewards, curves, kls))).numpy()
    return np.where(rewards <= curves[:, 0], 0.0, needed)


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
    with reference.activated() as model:
        own = [p for name, p in model.named_parameters() if "lora_" not in name or f".{REFERENCE_ADAPTER}." in name]
        digests = sorted(hashlib.sha256(p.detach().cpu().contiguous().numpy()).hexdigest() for p in own)
    whole = hashlib.sha256("".join(digests).encode()).hexdigest()
    return _settings_of(config) | {"reference_weights": whole[:16]}


def _settings_of(config: Config) -> dict[str, object]:
    settings = config.as_dict()
    return {name: settings[name] for name in SETTINGS}


def _different(frontier: Frontier, identity: dict[str, object]) -> dict[str, tuple[object, object]]:
    theirs = frontier.identity
    return {name: (theirs.get(name), ours) for name, ours in identity.items() if theirs.get(name) != ours}


def find_frontier(config: Config, reference: Reference) -> Frontier | None:
    """The first in `DIRECTORIES` that belongs to this recipe; files that cannot be read are passed over."""
    for path in (path for directory in DIRECTORIES for path in sorted(directory.glob("*.json"))):
        try:
            frontier = load_frontier(path)
        except ConfigError:
            continue
        # The weights are read only where all else agrees.
        if not _different(frontier, _settings_of(config)) and not _different(frontier, identity_of(config, reference)):
            return frontier
    return None


def check_belongs(frontier: Frontier, identity: dict[str, object], path: str) -> None:
    """Raise `ConfigError` with what differs where the frontier is another reference's, reward's or prompts'."""
    different = _different(frontier, identity)
    if different:
        told = "; ".join(f"{name} is {theirs!r} there and {ours!r} here" for name, (theirs, ours) in different.items())
        raise ConfigError(
            f"frontier={path!r} belongs to another recipe: {told}. Make one of this recipe, or leave it out."
        )


def estimate_frontier(
    accelerator: Accelerator,
    reference: Reference,
    reward: ComposedReward,
    tokenizer: PreTrainedTokenizerBase,
    held_out: Openings,
    config: Config,
) -> Frontier:
    """Sample the reference for held-out prompts, each worker its share of the samples; the same result on all.

    Raises:
        RewardError: the reward broke its contract on some response.
    """
    count = min(config.run.frontier_prompts, len(held_out))
    prompts = prompt_batch(
        held_out, tokenizer, step=0, batch_size=count, min_tokens=config.data.prompt_min_tokens,
        max_tokens=config.data.prompt_max_tokens, pad_token_id=tokenizer.pad_token_id, seed=SEED,
    )  # fmt: skip
    workers = accelerator.num_processes
    rounds = max(1, round(config.run.frontier_samples / (STAGES * workers))) * workers  # in each stage

    def sampled(plan: np.ndarray, first: int) -> Tensor:
        """Scores (rounds, n) of a response to each prompt of `plan` (rounds, n), shared out over the workers."""
        mine = share(accelerator, len(plan))
        scores = torch.stack(
            [
                _scores(accelerator, reference, reward, tokenizer, prompts.take(plan[number]), config, first + number)
                for number in range(len(plan))[mine]
            ]
        )
        scores = accelerator.gather(scores.to(accelerator.device)) if workers > 1 else scores
        return scores.cpu().double()

    plans, scores = [np.tile(np.arange(count), (rounds, 1))], []
    for stage in range(STAGES):
        scores.append(sampled(plans[-1], stage * rounds))
        by_prompt = _by_prompt(torch.cat(scores).flatten(), np.concatenate(plans).ravel(), count)
        if stage == 0:
            spread = float((by_prompt - by_prompt.mean(1, keepdim=True)).square().mean().sqrt()) or 1.0
            prices = spread * torch.logspace(1, -2, PRICES, dtype=torch.float64)  # from hardly any KL to one sample's
        best = optimum(by_prompt, prices)
        taken = (~by_prompt.isnan()).sum(1).numpy()
        plans.append(more_samples(best.effective_samples.numpy(), taken, rounds * count).reshape(rounds, count))
    arrays = (prices, best.reward.T, best.kl.T, best.effective_samples.T)
    return Frontier(*(x.numpy() for x in arrays), STAGES * rounds, identity_of(config, reference))


def more_samples(effective_samples: np.ndarray, taken: np.ndarray, extra: int) -> np.ndarray:
    """Which prompts get `extra` further samples (extra,): prompt numbers, in order.

    The lower the price of KL, the fewer samples of the reference resemble the optimum's, and much fewer after some
    openings than after others. Samples go where they are missing for the lowest price that can be had for all but the
    hardest tenth of the prompts, which get no more than the others.

    Args:
        effective_samples: (B, n) of the samples so far, falling along B.
        taken: (n,) samples so far.
    """
    given = np.zeros(len(taken), dtype=np.int64)
    for effective in effective_samples:
        whole = np.ceil(taken * SPARE * ENOUGH_SAMPLES / effective)
        whole = np.minimum(whole, np.quantile(whole, TRUSTED_SHARE, method="lower"))
        wanted = np.maximum(whole - taken, 0).astype(np.int64)
        if wanted.sum() > extra:
            break
        given = wanted
    left = extra - given.sum()
    given += left // len(taken)
    given[: left % len(taken)] += 1
    return np.repeat(np.arange(len(taken)), given)


def _by_prompt(scores: Tensor, prompts: np.ndarray, count: int) -> Tensor:
    """Scores (K,) of the prompts with these numbers (K,), a row a prompt: (count, the most of any), else NaN."""
    rows = [scores[torch.from_numpy(prompts == i)] for i in range(count)]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=math.nan)


def _scores(
    accelerator: Accelerator,
    reference: Reference,
    reward: ComposedReward,
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
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, options=sampling_options(rollout),
        )  # fmt: skip
        reading = None
        if reward.reads:
            reading = read(
                reference, responses, unprompted=reward.unprompted, first_token_id=first_token_id(tokenizer),
                temperature=rollout.temperature, microbatch_size=rollout.rollout_microbatch_size,
            )  # fmt: skip
        texts = response_texts(responses, prompts.text, tokenizer)

        def score() -> Tensor:
            return reward.weighted(reward.raw(reward.text_scores(prompts.text, texts), reading)).sum(1)

        return all_or_none(accelerator, score)


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
