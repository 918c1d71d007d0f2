"""Before against after: the same held-out prompts and the same sampling noise through both models."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pipeline.config import Config
from pipeline.data.prompts import Openings, PromptBatch, prompt_batch
from pipeline.data.tokens import start_ids
from pipeline.frontiers import Frontier, overspend, overspend_cell
from pipeline.intervals import bootstrap_interval
from pipeline.models.card import markdown_table
from pipeline.models.policy import Policy, Reference
from pipeline.models.vocabulary import eos_token_ids
from pipeline.plane import curve_of, draw_plane, way_of
from pipeline.ppo.kl import kl_estimate
from pipeline.rewards.composed import ComposedReward
from pipeline.rewards.reading import Reading, joined, read
from pipeline.rewards.repetition import ngrams
from pipeline.rollout.graphs import DecodeGraphs
from pipeline.rollout.rollout import Responses, concatenated, policy_outputs, response_texts, sample_responses
from pipeline.rollout.sampling import sampling_noise, sampling_options
from pipeline.run_directory import EVALUATION_FILE, EVALUATION_TEXT, METRICS_FILE, PLANE_FILE, SAMPLES_FILE
from pipeline.runtime.distributed import all_or_none, gather_fields, share
from pipeline.runtime.engine import autocast, moving_weights

EVALUATION_SEED = 20260  # fixed, so that runs of any seed are compared on the same prompts and noise


@dataclass(frozen=True)
class Evaluation:
    """`figures` as evaluation.json holds them, and one row a prompt for reading side by side."""

    figures: dict[str, object]
    rows: list[dict[str, object]]  # prompt; before and after with score and every measure; KL of after
    frontier: Frontier | None = None  # what it was held against


@dataclass(frozen=True)
class _Side(Responses):
    """One model's responses with what is measured of them; gathered over the workers."""

    measures: Tensor  # (N, number of measures)
    kl: Tensor  # (N,) log p - log q summed over the response, nats; zero for the original itself
    ref_logprob: Tensor  # (N,) log-probability of the response under the original model


def distinct(texts: Sequence[str], n: int) -> float:
    """Different n-grams of words as a share of all n-grams of `texts` (Li et al. 2016, distinct-n); 0 without any."""
    grams = [gram for text in texts for gram in ngrams(text, n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def repeated(texts: Sequence[str], n: int) -> float:
    """N-grams of words that stood in the same text before, as a share of all n-grams of `texts`; 0 without any.

    Source: rep-n of Welleck et al. 2020 (neural text degeneration), over all texts together.
    """
    grams = [ngrams(text, n) for text in texts]
    total = sum(map(len, grams))
    return sum(len(own) - len(set(own)) for own in grams) / total if total else 0.0


def summary(values: Tensor) -> dict[str, object]:
    """Mean, median and the 95 % bootstrap interval of the mean."""
    array = values.double().numpy()
    return {"mean": float(array.mean()), "median": float(np.median(array)), "ci95": list(bootstrap_interval(array))}


def evaluate(
    accelerator: Accelerator,
    policy: Policy,
    reference: Reference,
    reward: ComposedReward,
    tokenizer: PreTrainedTokenizerBase,
    held_out: Openings,
    config: Config,
    frontier: Frontier | None = None,
    between_batches: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Compare the policy with its reference on held-out prompts; collective, the same result on every worker.

    With a frontier of the same recipe also with what its KL could have bought. `between_batches` is called as often on
    every worker; what it raises ends the evaluation.

    Raises:
        RewardError: the reward broke its contract on some response.
    """
    count = min(config.run.evaluation_prompts, len(held_out))
    workers = accelerator.num_processes
    padded = math.ceil(count / workers) * workers  # equal shares; what is too much is cut after gathering
    prompts = _prompts(held_out, tokenizer, config, count, padded)
    graphs = DecodeGraphs(moving_weights(accelerator))
    with reference.activated() as original:
        names, before = _side(
            accelerator, original, None, reference, reward, tokenizer, prompts, config, graphs, between_batches
        )
    _, after = _side(
        accelerator, policy.model, policy, reference, reward, tokenizer, prompts, config, graphs, between_batches
    )
    texts = {
        "before": response_texts(before, prompts.text, tokenizer)[:count],
        "after": response_texts(after, prompts.text, tokenizer)[:count],
    }
    figures: dict[str, object] = {}
    for name, side in (("before", before), ("after", after)):
        tokens = side.response_mask[:count].sum().item()
        figures[name] = {
            **{measure: summary(side.measures[:count, i].cpu()) for i, measure in enumerate(names)},
            "distinct_1": distinct(texts[name], 1),
            "distinct_2": distinct(texts[name], 2),
            "repeated_3": repeated(texts[name], 3),
            "perplexity": math.exp(-side.ref_logprob[:count].sum().item() / tokens),
            "response_tokens_mean": tokens / count,
        }
    kl = summary(after.kl[:count].cpu())
    figures |= {"kl": kl["mean"], "kl_ci95": kl["ci95"], "prompts": count}
    rewarded = names.index(reward.measure)
    figures["reward"] = {
        "name": names[rewarded],
        "metric": reward.metric,
        **{name: figures[name][names[rewarded]] for name in ("before", "after")},
    }
    if frontier is not None:
        figures["frontier"] = overspend(
            frontier, after.measures[:count, rewarded].cpu().double().numpy(), after.kl[:count].cpu().double().numpy()
        )
    shown = names.index("probability") if "probability" in names else 0
    rows = [
        {
            "prompt": prompts.text[i],
            "before": texts["before"][i],
            "before_score": before.measures[i, shown].item(),
            "before_measures": dict(zip(names, before.measures[i].tolist(), strict=True)),
            "after": texts["after"][i],
            "after_score": after.measures[i, shown].item(),
            "after_measures": dict(zip(names, after.measures[i].tolist(), strict=True)),
            "after_kl": after.kl[i].item(),
        }
        for i in range(count)
    ]
    return Evaluation(figures, rows, frontier)


def _prompts(
    held_out: Openings, tokenizer: PreTrainedTokenizerBase, config: Config, count: int, padded: int
) -> PromptBatch:
    prompts = prompt_batch(
        held_out, tokenizer, step=0, batch_size=count, min_tokens=config.data.prompt_min_tokens,
        max_tokens=config.data.prompt_max_tokens, pad_token_id=tokenizer.pad_token_id, seed=EVALUATION_SEED,
    )  # fmt: skip
    return prompts.take(np.arange(padded) % count)


def _side(
    accelerator: Accelerator,
    model: torch.nn.Module,
    policy: Policy | None,
    reference: Reference,
    reward: ComposedReward,
    tokenizer: PreTrainedTokenizerBase,
    prompts: PromptBatch,
    config: Config,
    graphs: DecodeGraphs,
    between_batches: Callable[[], None],
) -> tuple[list[str], _Side]:
    """Sample with `model` and measure; `policy` is None where the model is the reference."""
    rollout = config.rollout
    mine = share(accelerator, len(prompts))
    uniforms, lengths = sampling_noise(
        EVALUATION_SEED, 0, len(prompts), rollout.response_min_tokens, rollout.response_max_tokens
    )
    size = rollout.rollout_microbatch_size
    batches = []
    with autocast(accelerator), torch.no_grad():
        for start in range(mine.start, mine.stop, size):
            between_batches()
            batch = slice(start, min(start + size, mine.stop))
            responses, _ = sample_responses(
                model,
                prompts.slice(batch.start, batch.stop),
                uniforms[batch],
                lengths[batch],
                microbatch_size=size,
                eos_token_id=eos_token_ids(model, tokenizer),
                pad_token_id=tokenizer.pad_token_id,
                options=sampling_options(rollout),
                graphs=graphs,
            )
            options = {"temperature": rollout.temperature, "microbatch_size": size}
            batches.append((responses, *reading_and_kl(policy, reference, reward, tokenizer, responses, **options)))
    between_batches()
    responses = concatenated([responses for responses, _, _ in batches])
    reading = joined([reading for _, reading, _ in batches])
    kl = torch.cat([kl for _, _, kl in batches])
    texts = response_texts(responses, prompts.text[mine], tokenizer)
    measures = all_or_none(accelerator, lambda: reward.measures(prompts.text[mine], texts, reading))
    local = _Side(
        **vars(responses),
        measures=torch.stack(list(measures.values()), 1).to(accelerator.device),
        kl=kl,
        ref_logprob=reading.logprobs.sum(1),
    )
    return list(measures), gather_fields(accelerator, local)


def reading_and_kl(
    policy: Policy | None,
    reference: Reference,
    reward: ComposedReward,
    tokenizer: PreTrainedTokenizerBase,
    responses: Responses,
    *,
    temperature: float,
    microbatch_size: int,
) -> tuple[Reading, Tensor]:
    """What the reference reads in responses, for the reward; and their KL from it (n,), log p - log q summed, nats.

    `policy` is the one that sampled them, None where the reference did, whose KL is zero.
    """
    options = {"temperature": temperature, "microbatch_size": microbatch_size}
    reading = read(reference, responses, unprompted=reward.unprompted, start_ids=start_ids(tokenizer), **options)
    logprobs = reading.logprobs if policy is None else policy_outputs(policy, responses, **options).logprobs
    return reading, kl_estimate(logprobs, reading.logprobs).sum(1)


def write_evaluation(evaluation: Evaluation, directory: Path) -> None:
    """Write `evaluation.json` (the figures), `evaluation.md` (figures and samples side by side) and `plane.png`.

    All samples go to `evaluation_samples.jsonl`, a prompt a line, as `Evaluation.rows` has them.
    The way of the training over the plane of KL and reward is added to the figures, from the metrics in `directory`,
    and the frontier's curve.
    """
    evaluation.figures["way"] = way_of(directory / METRICS_FILE, evaluation.figures["reward"]["metric"])
    if evaluation.frontier is not None:
        evaluation.figures["frontier_curve"] = curve_of(evaluation.frontier)
    draw_plane(directory / PLANE_FILE, evaluation.figures, evaluation.frontier)
    (directory / EVALUATION_FILE).write_text(json.dumps(evaluation.figures, indent=2) + "\n", encoding="utf-8")
    with (directory / SAMPLES_FILE).open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in evaluation.rows)
    figures, samples = markdown_table(figures_table(evaluation)), markdown_table(samples_table(evaluation, 20))
    plane = f"![KL and reward of the training]({PLANE_FILE})"
    text = f"# Before and after\n\n{figures}\n\n{plane}\n\n## Samples\n\n{samples}\n"
    (directory / EVALUATION_TEXT).write_text(text, encoding="utf-8")


def figures_table(evaluation: Evaluation) -> list[list[str]]:
    """The figures as rows of cells, the first row the header."""
    before, after = evaluation.figures["before"], evaluation.figures["after"]
    other = "".join(f", {name}={value}" for name, value in evaluation.figures.get("settings", {}).items())
    rows = [[f"{evaluation.figures['prompts']} held-out prompts{other}", "before", "after"]]
    for name, value in before.items():
        if isinstance(value, dict):
            rows.append([f"{name}, mean (95 % interval)", _mean(value), _mean(after[name])])
            rows.append([f"{name}, median", f"{value['median']:.3f}", f"{after[name]['median']:.3f}"])
        else:
            rows.append([name.replace("_", " "), f"{value:.3f}", f"{after[name]:.3f}"])
    low, high = evaluation.figures["kl_ci95"]
    kl = f"{evaluation.figures['kl']:.2f} ({low:.2f} to {high:.2f})"
    rows.append(["KL from the original, nats a response", "0", kl])
    return rows + _frontier_rows(evaluation.figures.get("frontier"))


def _frontier_rows(frontier: dict[str, object] | None) -> list[list[str]]:
    if frontier is None:
        return []
    if "beyond" in frontier:
        return [["KL overspend", "", frontier["beyond"]]]
    low, high = frontier["kl_needed_ci95"]
    spent, least, most = map(overspend_cell, (frontier["kl_overspend"], *frontier["kl_overspend_ci95"]))
    return [
        ["least KL for that reward, nats", "", f"{frontier['kl_needed']:.2f} ({low:.2f} to {high:.2f})"],
        ["KL overspend (1 is perfect)", "", f"{spent} ({least} to {most})"],
    ]


def samples_table(evaluation: Evaluation, count: int) -> list[list[str]]:
    """The first `count` prompts with both continuations as rows of cells, the first row the header."""
    rows = [["prompt", "before", "", "after", ""]]
    for row in evaluation.rows[:count]:
        cells = [row["prompt"], row["before"], f"{row['before_score']:.2f}", row["after"], f"{row['after_score']:.2f}"]
        rows.append([" ".join(cell.split()) for cell in cells])
    return rows


def _mean(value: dict[str, object]) -> str:
    low, high = value["ci95"]
    return f"{value['mean']:.3f} ({low:.3f} to {high:.3f})"
