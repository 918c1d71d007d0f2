"""The best reward at each KL, for a recipe's reference, reward and prompts; and how far from it a run ended.

The optimum's estimate is `ppo/optimum.py`'s, its samples are drawn in `frontier_samples.py`; here are its intervals and
its file.
"""

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pipeline.config import Config, ConfigError
from pipeline.data.prompts import Openings
from pipeline.errors import writing
from pipeline.inputs import classifier_fingerprints, openings_fingerprint
from pipeline.models.loading import REFERENCE_ADAPTER
from pipeline.models.policy import Reference
from pipeline.ppo.optimum import kl_at

SEED = 20261  # of the samples; not the evaluation's, whose own noise is not to be judged by itself
# A point is trusted with as many effective samples after so many of the prompts; log Z is then too low by about half
# their inverse, in nats.
ENOUGH_SAMPLES, TRUSTED_SHARE = 7.0, 0.9
RESAMPLES = 2000
DIRECTORIES = (Path("runs/frontiers"), Path("assets/frontiers"))  # a recipe's own: made here, shipped

FINGERPRINT = "fingerprint of"

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
    identity: dict[str, object]  # what it belongs to: the settings, and fingerprints of weights and prompts

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
        """Write it as JSON, curves with five digits; raises `WriteError`."""
        content = {
            "identity": self.identity,
            "samples": self.samples,
            "trusted": int(self.trusted.sum()),
            "prices": _digits(self.prices),
            "rewards": _digits(self.rewards),
            "kls": _digits(self.kls),
            "effective_samples": _digits(self.effective_samples),
        }
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
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


def identity_of(config: Config, reference: Reference, held_out: Openings) -> dict[str, object]:
    """What a frontier of this recipe belongs to; reads the reference's weights once, whatever they are wrapped in."""
    with reference.activated() as model:
        own = [p for name, p in model.named_parameters() if "lora_" not in name or f".{REFERENCE_ADAPTER}." in name]
        digests = sorted(hashlib.sha256(p.detach().cpu().contiguous().numpy()).hexdigest() for p in own)
    whole = hashlib.sha256("".join(digests).encode()).hexdigest()
    read = {"held-out openings": openings_fingerprint(held_out)} | classifier_fingerprints(config)
    fingerprints = {f"{FINGERPRINT} {name}": value for name, value in read.items()}
    return _settings_of(config) | {"reference_weights": whole[:16]} | fingerprints


def _settings_of(config: Config) -> dict[str, object]:
    settings = config.as_dict()
    return {name: settings[name] for name in SETTINGS}


def _different(frontier: Frontier, identity: dict[str, object]) -> dict[str, tuple[object, object]]:
    theirs = frontier.identity
    return {
        name: (theirs.get(name), ours)
        for name, ours in identity.items()
        if theirs.get(name) != ours and (name in theirs or not name.startswith(FINGERPRINT))  # older ones have none
    }


def find_frontier(config: Config, reference: Reference, held_out: Openings) -> Frontier | None:
    """The first in `DIRECTORIES` that belongs to this recipe; files that cannot be read are passed over."""
    for path in (path for directory in DIRECTORIES for path in sorted(directory.glob("*.json"))):
        try:
            frontier = load_frontier(path)
        except ConfigError:
            continue
        # The weights are read only where all else agrees.
        if _different(frontier, _settings_of(config)):
            continue
        if not _different(frontier, identity_of(config, reference, held_out)):
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


def overspend_cell(value: float) -> str:
    """An overspend in words; it has no bound where hardly any KL was needed."""
    return f"{value:.2f}" if value < 1000 else "over 1000"


def _digits(values: np.ndarray) -> object:
    return json.loads(json.dumps(values.tolist()), parse_float=lambda text: float(f"{float(text):.5g}"))
