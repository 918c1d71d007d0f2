"""Do people agree? The reward, and the tuned model's likelihood against the original's, on what people preferred."""

import json
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pipeline.config import Config
from pipeline.data.preferences import Preferences
from pipeline.data.tokens import prefix_ids, start_ids, text_ids
from pipeline.errors import writing
from pipeline.intervals import RANKINGS, bootstrap_interval, rank_figures
from pipeline.models.card import markdown_table
from pipeline.models.policy import Policy, Reference
from pipeline.rewards.composed import ComposedReward
from pipeline.rollout.rollout import Responses, policy_outputs, reference_logprobs
from pipeline.runtime.distributed import all_or_none, gather_fields, share

PREFERENCES_FILE = "preferences.json"
FEW = 30  # rows below which a bootstrap promises too much: where all agree, an interval of no width
LIKELIHOODS = {
    "tuned": "likelihood of the tuned model",
    "original": "likelihood of the original",
    "log_ratio": "tuned likelihood over the original's",
}

Tokens = tuple[int, ...]
T = TypeVar("T", bound=Hashable)


@dataclass(frozen=True)
class Readings:
    """What reward and models say of n rows of k responses; gathered over the workers."""

    scores: Tensor  # (n, k)
    tuned: Tensor  # (n, k) log-probability of the response after the prompt, nats; zero where it does not fit
    original: Tensor  # (n, k) the same under the original model
    lengths: Tensor  # (n,) tokens of the prompt and the longest response


def tokenized(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], responses: Sequence[Sequence[str]]
) -> list[tuple[Tokens, list[Tokens]]]:
    """Each row as (prompt tokens, tokens of each response), cut at one place for all responses of a row.

    Prompt and response are tokenized as one text, as a model would have read it. Where the prompt's last letters make a
    token with the response's first ones, the cut is before that token. What the tokenizer puts before every text stands
    before the prompt; an empty prompt of a tokenizer that puts nothing there becomes the BOS token, or EOS, which GPT-2
    has instead.
    """
    prefix, start = prefix_ids(tokenizer), start_ids(tokenizer)
    width = len(responses[0])
    flat = [prompt + text for prompt, texts in zip(prompts, responses, strict=True) for text in texts]
    wholes = text_ids(tokenizer, flat)
    rows = []
    for i, prompt in enumerate(text_ids(tokenizer, prompts)):
        own = wholes[i * width : (i + 1) * width]
        cut = max(0, min(min(_common(prompt, whole), len(whole) - 1) for whole in own))  # at least one token is read
        rows.append(((*prefix, *own[0][:cut]) or start, [tuple(whole[cut:]) for whole in own]))
    return rows


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many first tokens two texts share."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def read_once(items: Sequence[T], read: Callable[[list[T]], Tensor]) -> Tensor:
    """`read` (…, n) of n items, equal ones once: rounding, which differs by batch, must not decide between them."""
    places = {item: place for place, item in enumerate(dict.fromkeys(items))}
    return read(list(places))[..., [places[item] for item in items]]


def laid_out(samples: Sequence[tuple[Tokens, Tokens]], pad_token_id: int, device: torch.device) -> Responses:
    """Samples (prompt tokens, response tokens) as a batch: prompts padded on the left, responses on the right."""
    widths = [max(len(sample[side]) for sample in samples) for side in (0, 1)]
    tokens = [torch.full((len(samples), width), pad_token_id) for width in widths]
    masks = [torch.zeros(len(samples), width, dtype=torch.bool) for width in widths]
    for row, (prompt, response) in enumerate(samples):
        for side, ids, where in (
            (0, prompt, slice(widths[0] - len(prompt), None)),
            (1, response, slice(len(response))),
        ):
            tokens[side][row, where] = torch.tensor(ids)
            masks[side][row, where] = True
    return Responses(*(x.to(device) for pair in zip(tokens, masks, strict=True) for x in pair))


def read_likelihoods(
    policy: Policy,
    reference: Reference,
    samples: Sequence[tuple[Tokens, Tokens]],
    *,
    pad_token_id: int,
    temperature: float,
    batch_tokens: int,
) -> Tensor:
    """Log-probability of each response after its prompt under the policy and the reference, (2, n), in float32.

    Samples of like length go through together, at most `batch_tokens` tokens a forward, or one sample.
    """
    device = next(policy.parameters()).device
    found = torch.zeros(2, len(samples), device=device)
    order = sorted(range(len(samples)), key=lambda i: -sum(map(len, samples[i])))
    start = 0
    while start < len(order):
        batch = order[start : start + max(1, batch_tokens // sum(map(len, samples[order[start]])))]
        responses = laid_out([samples[i] for i in batch], pad_token_id, device)
        options = {"temperature": temperature, "microbatch_size": len(batch)}
        found[0, batch] = policy_outputs(policy, responses, **options).logprobs.sum(1)
        found[1, batch] = reference_logprobs(reference, responses, **options).sum(1)
        start += len(batch)
    return found


def read_all(
    accelerator: Accelerator,
    policy: Policy,
    reference: Reference,
    reward: ComposedReward,
    tokenizer: PreTrainedTokenizerBase,
    preferences: Preferences,
    config: Config,
) -> Readings:
    """Share the rows out, read them with reward and models, gather: collective, the same on every worker.

    Raises:
        RewardError: the reward broke its contract on some response.
    """
    count, width = len(preferences), len(preferences.responses[0])
    padded = -(-count // accelerator.num_processes) * accelerator.num_processes  # equal shares, cut after gathering
    mine = [i % count for i in range(padded)][share(accelerator, padded)]
    prompts, texts = [preferences.prompts[i] for i in mine], [preferences.responses[i] for i in mine]
    whole = [(prompt, text) for prompt, row in zip(prompts, texts, strict=True) for text in row]
    scores = all_or_none(
        accelerator,
        lambda: read_once(whole, lambda items: reward.of_texts_alone(*map(list, zip(*items, strict=True)))),
    )
    rows = tokenized(tokenizer, prompts, texts)
    lengths = [len(prompt) + max(map(len, responses)) for prompt, responses in rows]
    fitting = [i for i, length in enumerate(lengths) if length <= context_of(policy)]
    rollout = config.rollout
    read = read_once(
        [(rows[i][0], response) for i in fitting for response in rows[i][1]],
        lambda samples: read_likelihoods(
            policy,
            reference,
            samples,
            pad_token_id=tokenizer.pad_token_id,
            temperature=rollout.temperature,
            batch_tokens=rollout.rollout_microbatch_size
            * (config.data.prompt_max_tokens + rollout.response_max_tokens),
        ),
    )
    likelihoods = torch.zeros(2, len(mine), width, device=accelerator.device)
    likelihoods[:, fitting] = read.view(2, len(fitting), width)
    local = Readings(
        scores.view(-1, width).to(accelerator.device), *likelihoods, torch.tensor(lengths, device=accelerator.device)
    )
    return Readings(*(value[:count].cpu() for value in vars(gather_fields(accelerator, local)).values()))


def context_of(policy: Policy) -> int:
    """Tokens of the longest text the model reads."""
    return getattr(policy.config, "max_position_embeddings", None) or 2**31


def preference_figures(readings: Readings, ratings: Sequence[float] | None, context: int) -> dict[str, object]:
    """How reward and likelihoods agree with people, as preferences.json holds it.

    Rows longer than `context` tokens are in the reward's figures and not in the likelihoods'.
    """
    scores, tuned, original = (x.double().numpy() for x in (readings.scores, readings.tuned, readings.original))
    fits = (readings.lengths <= context).numpy()
    sides = {"tuned": tuned[fits], "original": original[fits], "log_ratio": (tuned - original)[fits]}
    likelihood: dict[str, object] = {"rows": int(fits.sum()), "left_out": int((~fits).sum()), "context_tokens": context}
    if ratings is None:
        reward: dict[str, object] = {"ties": int((scores[:, 0] == scores[:, 1]).sum()), **_accuracy(preferred(scores))}
        if fits.any():
            shares = {name: preferred(side) for name, side in sides.items()}
            likelihood |= {name: _accuracy(values) for name, values in shares.items()}
            likelihood["gain"] = _accuracy(shares["tuned"] - shares["original"])
    else:
        people = np.array(ratings)
        reward = rank_figures(scores[:, 0], people)
        if fits.any():
            likelihood["log_ratio"] = rank_figures(sides["log_ratio"][:, 0], people[fits])
    kind = "pairs" if ratings is None else "ratings"
    return {"kind": kind, "rows": len(scores), "reward": reward, "likelihood": likelihood}


def preferred(values: np.ndarray) -> np.ndarray:
    """Of pairs (n, 2): 1 where the first is larger, 0 where the second is, 0.5 where they are equal."""
    return (np.sign(values[:, 0] - values[:, 1]) + 1) / 2


def _accuracy(values: np.ndarray) -> dict[str, object]:
    return {"value": float(values.mean()), "ci95": list(bootstrap_interval(values))}


def agreement(
    accelerator: Accelerator,
    policy: Policy,
    reference: Reference,
    reward: ComposedReward,
    tokenizer: PreTrainedTokenizerBase,
    preferences: Preferences,
    config: Config,
) -> dict[str, object]:
    """The figures of `preferences` for a run's parts; collective, the same on every worker. Raises as `read_all`."""
    readings = read_all(accelerator, policy, reference, reward, tokenizer, preferences, config)
    figures = preference_figures(readings, preferences.ratings, context_of(policy))
    judges = [component.name for component in reward.components if component.of_texts]
    left_out = [component.name for component in reward.components if not component.of_texts]
    without = f", without {', '.join(left_out)}" if left_out else ""
    return {**figures, "reward_name": " + ".join(judges) + without}


def preferences_table(figures: dict[str, object]) -> list[list[str]]:
    """The figures as rows of cells, the first row the header."""
    reward, likelihood = figures["reward"], figures["likelihood"]
    label = f"reward ({figures['reward_name']})"
    if figures["kind"] == "pairs":
        rows = [[f"{figures['rows']} pairs", "chosen preferred (95 % interval)"]]
        rows.append([label, f"{_cell(reward)}, {reward['ties']} ties"])
        rows += [[label, _cell(likelihood[name])] for name, label in LIKELIHOODS.items() if name in likelihood]
        if "gain" in likelihood:
            rows.append(["tuned less original", _cell(likelihood["gain"], "+")])
    else:
        rows = [[f"{figures['rows']} rated texts (95 % interval)", "Spearman", "Kendall tau-b", "pairwise accuracy"]]
        rows.append([label, *(_cell(reward[name]) for name in RANKINGS)])
        if "log_ratio" in likelihood:
            rows.append([LIKELIHOODS["log_ratio"], *(_cell(likelihood["log_ratio"][name]) for name in RANKINGS)])
    if likelihood["left_out"]:
        said = f"not in the likelihoods: longer than the model's context of {likelihood['context_tokens']} tokens"
        rows.append([said, f"{likelihood['left_out']} of {figures['rows']}"])
    if min(figures["rows"], likelihood["rows"] or figures["rows"]) < FEW:
        rows.append([f"fewer than {FEW} rows: the intervals are too narrow", ""])
    return [row + [""] * (len(rows[0]) - len(row)) for row in rows]


def _cell(figure: dict[str, object] | None, sign: str = "") -> str:
    if figure is None:
        return "undefined, all values are equal"
    low, high = figure["ci95"]
    return f"{figure['value']:{sign}.3f} ({low:{sign}.3f} to {high:{sign}.3f})"


def write_preferences(figures: dict[str, object], directory: Path) -> None:
    """Write `preferences.json` and `preferences.md` into `directory`; raises `WriteError`."""
    path = directory / PREFERENCES_FILE
    text = f"# Agreement with people\n\n{markdown_table(preferences_table(figures))}\n"
    with writing(path):
        path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
        path.with_suffix(".md").write_text(text, encoding="utf-8")
