"""A reward of several weighted components, each with its own name in the figures."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.rewards.protocol import Reward, RewardError, checked, checked_measures, checked_scores, short
from pipeline.rewards.reading import Reading, ReadingReward
from pipeline.rewards.scaling import RunningMoments
from pipeline.rewards.terms import SENTIMENT

TOTAL = "reward"  # the measure of a composed reward as a whole
LARGEST = 1e15  # of a score: the squares that losses and gradients take of it, and their sums, must fit float32


@dataclass(frozen=True)
class Component:
    """One of the two: a reward of texts, or of what the reference reads in them."""

    name: str
    weight: float
    of_texts: Reward | None = None
    of_reading: ReadingReward | None = None
    unprompted: bool = False  # of_reading wants the responses read without their prompts as well
    source: str | None = None  # as the recipe has it, which is what messages call it

    @property
    def called(self) -> str:
        return self.source or self.name


@dataclass(frozen=True)
class ComposedReward:
    """The weighted sum of K components; with `whitening`, of the components over their running spread."""

    components: Sequence[Component]
    whitening: bool = False

    @property
    def names(self) -> list[str]:
        return [component.name for component in self.components]

    @property
    def reads(self) -> bool:
        """Whether a component needs a `Reading`."""
        return any(component.of_reading for component in self.components)

    @property
    def unprompted(self) -> bool:
        """Whether the reading must have the responses without their prompts too."""
        return any(component.unprompted for component in self.components)

    @property
    def is_sum(self) -> bool:
        """Whether there is more to it than one component's own score."""
        return len(self.components) > 1 or self.components[0].weight != 1 or self.whitening

    def text_scores(self, prompts: list[str], responses: list[str]) -> dict[str, Tensor]:
        """Raw scores (n,) of the components that judge texts, on the CPU.

        Raises:
            RewardError: one of them broke its contract.
        """
        return {c.name: checked_scores(c.of_texts, prompts, responses, c.called) for c in self.components if c.of_texts}

    def of_texts_alone(self, prompts: list[str], responses: list[str]) -> Tensor:
        """The weighted sum (n,) of the components that judge texts: for texts that nobody sampled.

        Raises:
            RewardError: there is none, or one broke its contract.
        """
        scores = self.text_scores(prompts, responses)
        if not scores:
            raise RewardError(f"none of the reward's components ({', '.join(self.names)}) judges texts by themselves.")
        return sum(c.weight * scores[c.name] for c in self.components if c.of_texts)

    def try_texts(self, prompts: list[str], responses: list[str]) -> None:
        """Score and measure texts, so that a fault shows; raises `RewardError`."""
        for c in self.components:
            if c.of_texts:
                checked_scores(c.of_texts, prompts, responses, c.called)
            if hasattr(c.of_texts, "measures"):
                checked_measures(c.of_texts, prompts, responses, c.called)

    def raw(self, text_scores: dict[str, Tensor], reading: Reading | None) -> Tensor:
        """All components' raw scores, (n, K), on the CPU; `reading` may be None where none `reads`."""
        return torch.stack([
            text_scores[c.name] if c.of_texts else checked(c.called, c.of_reading(reading), len(reading.mask))
            for c in self.components
        ], 1)  # fmt: skip

    def weighted(self, raw: Tensor, moments: Sequence[RunningMoments] | None = None) -> Tensor:
        """Components (N, K) times their weights; over the running deviation of each where `moments` are given.

        `moments` take in the batch first, which must be the same on all workers.
        """
        if moments is not None:
            raw = torch.stack([m.whitened(column) for m, column in zip(moments, raw.unbind(1), strict=True)], 1)
        return raw * raw.new_tensor([component.weight for component in self.components])

    def check_size(self, raw: Tensor, text: Callable[[int], tuple[str, str]]) -> None:
        """Refuse raw scores (n, K) whose weighted sum no update can learn from, before one is spoilt by it.

        Args:
            text: gives prompt and response of a sample.

        Raises:
            RewardError: names the component, its value and the sample.
        """
        weighted = self.weighted(raw.double())
        bad = (weighted.sum(1).abs() > LARGEST).nonzero().flatten().tolist()
        if bad:
            which = int(weighted[bad[0]].abs().argmax())
            prompt, response = text(bad[0])
            raise RewardError(
                f"the reward {self.components[which].called} is {weighted[bad[0], which].item():.3g} for prompt "
                f"{short(prompt)!r}, response {short(response)!r}: beyond {LARGEST:g}, whose square and gradient no "
                f"longer fit float32. Scale it to a size near 1, lower its weight, or set reward_clip."
            )

    def measures(self, prompts: list[str], responses: list[str], reading: Reading | None) -> dict[str, Tensor]:
        """What an evaluation reports, each (n,): every component, the classifier's on all its scales, and the sum.

        Raises:
            RewardError: a component broke its contract.
        """
        figures: dict[str, Tensor] = {}
        raw: dict[str, Tensor] = {}
        for c in self.components:
            if c.of_reading:
                raw[c.name] = figures[c.name] = checked(c.called, c.of_reading(reading), len(reading.mask))
            elif c.name == SENTIMENT or len(self.components) == 1:
                scales, own = checked_measures(c.of_texts, prompts, responses, c.called), _scale(c.of_texts)
                if own not in scales:  # measures beside the score
                    scales = {own: checked_scores(c.of_texts, prompts, responses, c.called), **scales}
                raw[c.name] = scales[own]
                figures |= scales
            else:
                raw[c.name] = figures[c.name] = checked_scores(c.of_texts, prompts, responses, c.called)
        if self.is_sum and not self.whitening:
            figures[TOTAL] = self.weighted(torch.stack(list(raw.values()), 1)).sum(1)
        return figures

    @property
    def metric(self) -> str:
        """Which of a step's figures is the mean of that measure."""
        return f"reward/{self.components[0].name}/raw_mean" if self.whitening else "reward/mean"

    @property
    def measure(self) -> str:
        """Which of the measures is what the policy was trained on; of a whitened sum, its first component's."""
        first = self.components[0]
        if self.is_sum and not self.whitening:
            return TOTAL
        if first.of_texts and (first.name == SENTIMENT or len(self.components) == 1):
            return _scale(first.of_texts)
        return first.name


def _scale(reward: Reward) -> str:
    return getattr(reward, "scale", "score")
