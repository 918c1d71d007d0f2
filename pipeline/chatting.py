"""Original and tuned model side by side: one opening, the same sampling noise, token by token, then score and KL."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pipeline.config import Config
from pipeline.data.tokens import prefix_ids, prompt_text, text_ids
from pipeline.errors import UserError
from pipeline.evaluation import reading_and_kl
from pipeline.models.kernels import many_forwards
from pipeline.models.policy import Policy, Reference
from pipeline.models.vocabulary import eos_token_ids
from pipeline.rewards.composed import ComposedReward
from pipeline.rewards.protocol import RewardError
from pipeline.rollout.decoding import Decoded, decode_stepwise
from pipeline.rollout.rollout import Responses, response_texts
from pipeline.rollout.sampling import sampling_noise, sampling_options

CHARACTERS_A_TOKEN = 24  # of the longest openings, and more than any text has
UNLIMITED_CONTEXT = 8192  # tokens of an opening for a model that has no limit of its own


class ChatError(UserError, ValueError):
    """An opening that cannot be continued; the message says why and what would do."""


@dataclass(frozen=True)
class Continuation:
    """What one model wrote so far; its figures are there when it has ended."""

    text: str
    scores: dict[str, float] | None = None  # what the run rewards; and the probability, where that is another figure
    kl: float | None = None  # log p - log q of the whole text, nats: zero for the original
    fault: str | None = None  # why there is no score, where the reward failed


@dataclass(frozen=True)
class Sides:
    """The same opening continued by both, sample by sample with the same noise."""

    original: list[Continuation]
    tuned: list[Continuation]


class Chat:
    """Both models and the reward of a run; a LoRA run's original is its tuned model with the adapter off."""

    def __init__(
        self,
        policy: Policy,
        reference: Reference,
        reward: ComposedReward,
        tokenizer: PreTrainedTokenizerBase,
        config: Config,
    ):
        self.policy, self.reference, self.reward = policy, reference, reward
        self.tokenizer, self.config = tokenizer, config
        self.eos_token_ids = eos_token_ids(policy.model, tokenizer)
        self._one_at_a_time = threading.Lock()  # who leaves in mid-step must not have the adapter switched under him

    @property
    def context(self) -> int | None:
        """Tokens that opening and continuation may have together, if there is a limit."""
        return getattr(self.policy.config, "max_position_embeddings", None)

    @property
    def longest_opening(self) -> int:
        """Characters beyond which an opening is refused unread: to tokenize millions of them takes long."""
        return CHARACTERS_A_TOKEN * (self.context or UNLIMITED_CONTEXT)

    def continue_opening(
        self, opening: str, *, temperature: float, tokens: int, samples: int, turn: int = 0
    ) -> Iterator[Sides]:
        """Give both models' continuations after each token, and at last with scores and KL.

        Args:
            tokens: of each continuation, at most.
            turn: another one has other noise.

        Raises:
            ChatError: the opening is empty, or too long for the model.
        """
        ids = self._ids(opening, tokens)
        device = next(self.policy.parameters()).device
        prompts = torch.tensor([ids] * samples, device=device)
        mask = torch.ones_like(prompts, dtype=torch.bool)
        uniforms, lengths = (x.to(device) for x in sampling_noise(self.config.run.seed, turn, samples, tokens, tokens))
        options = replace(sampling_options(self.config.rollout), temperature=temperature)
        read_as = prompt_text(self.tokenizer, ids)

        def stream(model: torch.nn.Module) -> Iterator[Decoded]:
            return decode_stepwise(
                model,
                prompts,
                mask,
                uniforms,
                lengths,
                eos_token_id=self.eos_token_ids,
                pad_token_id=self.tokenizer.pad_token_id,
                options=options,
            )

        def responses(decoded: Decoded) -> Responses:
            return Responses(prompts, mask, decoded.tokens, decoded.mask)

        def so_far(decoded: Decoded) -> list[Continuation]:
            texts = response_texts(responses(decoded), [read_as] * samples, self.tokenizer)
            return [Continuation(text.rstrip("\ufffd")) for text in texts]  # half of a letter of several bytes

        with self._one_at_a_time, self.reference.activated() as model:
            original = stream(model)
        tuned = stream(self.policy.model)
        left = right = None
        while True:
            with self._one_at_a_time:
                with self.reference.activated() as model, many_forwards(model):
                    more_left = next(original, None)
                with many_forwards(self.policy.model):
                    more_right = next(tuned, None)
            if more_left is None and more_right is None:
                break
            left, right = more_left or left, more_right or right
            yield Sides(so_far(left), so_far(right))
        with self._one_at_a_time:
            yield Sides(
                self._judged(None, responses(left), read_as, temperature),
                self._judged(self.policy, responses(right), read_as, temperature),
            )

    def _ids(self, opening: str, tokens: int) -> list[int]:
        if len(opening) > self.longest_opening:
            raise ChatError(
                f"The opening has {len(opening)} characters, and the model reads {self.longest_opening} at the very "
                f"most. Shorten it."
            )
        (ids,) = text_ids(self.tokenizer, [opening.rstrip()])
        if not ids:
            raise ChatError("Type the beginning of a text first: a few words will do.")
        ids = [*prefix_ids(self.tokenizer), *ids]
        if self.context is not None and len(ids) + tokens > self.context:
            raise ChatError(
                f"The opening has {len(ids)} tokens and the continuation up to {tokens}: together {len(ids) + tokens}, "
                f"and the model reads {self.context} at most. Shorten one of them."
            )
        return ids

    @torch.no_grad()
    def _judged(
        self, policy: Policy | None, responses: Responses, prompt: str, temperature: float
    ) -> list[Continuation]:
        count = len(responses)
        reading, kl = reading_and_kl(
            policy, self.reference, self.reward, self.tokenizer, responses,
            temperature=temperature, microbatch_size=count,
        )  # fmt: skip
        texts = response_texts(responses, [prompt] * count, self.tokenizer)
        fault = None
        try:
            measures = self.reward.measures([prompt] * count, texts, reading)
        except RewardError as error:  # what was written is still worth reading
            measures, fault = {}, str(error)
        shown: dict[str, Tensor] = {name: measures[name] for name in (self.reward.measure, "probability")
                                    if name in measures}  # fmt: skip
        return [
            Continuation(text, {name: values[i].item() for name, values in shown.items()}, kl[i].item(), fault)
            for i, text in enumerate(texts)
        ]
