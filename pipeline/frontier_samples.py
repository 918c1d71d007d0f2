"""Samples of the reference, from which a recipe's frontier is estimated; where samples are missing, more are drawn."""

import math
from collections.abc import Callable

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pipeline.config import Config
from pipeline.data.prompts import Openings, PromptBatch, prompt_batch
from pipeline.data.tokens import start_ids
from pipeline.frontiers import ENOUGH_SAMPLES, SEED, TRUSTED_SHARE, Frontier, identity_of
from pipeline.models.policy import Reference
from pipeline.models.vocabulary import eos_token_ids
from pipeline.ppo.optimum import optimum
from pipeline.rewards.composed import ComposedReward
from pipeline.rewards.reading import read
from pipeline.rollout.graphs import DecodeGraphs
from pipeline.rollout.rollout import response_texts, sample_responses
from pipeline.rollout.sampling import sampling_noise, sampling_options
from pipeline.runtime.distributed import all_or_none, share
from pipeline.runtime.engine import autocast, moving_weights

PRICES = 60  # points of the curve
SPARE = 1.2  # how many more effective samples are aimed at than are trusted
STAGES = 4  # of the sampling: after each it is seen where samples are missing


def estimate_frontier(
    accelerator: Accelerator,
    reference: Reference,
    reward: ComposedReward,
    tokenizer: PreTrainedTokenizerBase,
    held_out: Openings,
    config: Config,
    between_batches: Callable[[], None] = lambda: None,
) -> Frontier:
    """Sample the reference for held-out prompts, each worker its share of the samples; the same result on all.

    `between_batches` is called as often on every worker; what it raises ends the estimate.

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
    graphs = DecodeGraphs(moving_weights(accelerator))

    def sampled(plan: np.ndarray, first: int) -> Tensor:
        """Scores (rounds, n) of a response to each prompt of `plan` (rounds, n), shared out over the workers."""
        scores = []
        for number in range(len(plan))[share(accelerator, len(plan))]:
            between_batches()
            taken = prompts.take(plan[number])
            scores.append(_scores(accelerator, reference, reward, tokenizer, taken, config, first + number, graphs))
        scores = torch.stack(scores)
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
    return Frontier(*(x.numpy() for x in arrays), STAGES * rounds, identity_of(config, reference, held_out))


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
    graphs: DecodeGraphs,
) -> Tensor:
    """Scores (n,) of one response of the reference to each prompt."""
    rollout = config.rollout
    uniforms, lengths = sampling_noise(
        SEED, number, len(prompts), rollout.response_min_tokens, rollout.response_max_tokens
    )
    with reference.activated() as model, autocast(accelerator):
        responses, _ = sample_responses(
            model, prompts, uniforms, lengths, microbatch_size=rollout.rollout_microbatch_size,
            eos_token_id=eos_token_ids(model, tokenizer), pad_token_id=tokenizer.pad_token_id,
            options=sampling_options(rollout), graphs=graphs,
        )  # fmt: skip
        reading = None
        if reward.reads:
            reading = read(
                reference, responses, unprompted=reward.unprompted, start_ids=start_ids(tokenizer),
                temperature=rollout.temperature, microbatch_size=rollout.rollout_microbatch_size,
            )  # fmt: skip
        texts = response_texts(responses, prompts.text, tokenizer)

        def score() -> Tensor:
            return reward.weighted(reward.raw(reward.text_scores(prompts.text, texts), reading)).sum(1)

        return all_or_none(accelerator, score)
