"""Running statistics of the scores, for scaling and clipping them."""

from dataclasses import dataclass

from torch import Tensor


@dataclass
class RunningMoments:
    """Count, mean and sum of squared deviations of all scores seen (Chan et al. 1979)."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def update(self, scores: Tensor) -> None:
        """Take in a batch of scores (n,), the same on every worker."""
        batch = scores.double()
        n, mean = len(batch), batch.mean().item()
        squares = (batch - mean).square().sum().item()
        total = self.count + n
        delta = mean - self.mean
        self.mean += delta * n / total
        self.squares += squares + delta * delta * self.count * n / total
        self.count = total

    @property
    def std(self) -> float:
        """Standard deviation (biased) of all scores seen."""
        return (self.squares / self.count) ** 0.5

    def whitened(self, scores: Tensor) -> Tensor:
        """Take in a batch (n,), then give it minus the mean and over the deviation of all scores seen.

        While all scores are equal they are not divided.
        """
        self.update(scores)
        return (scores - self.mean) / (self.std if self.std > 1e-6 else 1.0)


def shaped_scores(scores: Tensor, moments: RunningMoments | None, clip: float | None) -> Tensor:
    """Scores (N,) divided by the running standard deviation where `moments` is given, then clipped to [-clip, clip].

    While all scores are equal they are left as they are.
    """
    if moments is not None:
        moments.update(scores)
        scores = scores / (moments.std if moments.std > 1e-6 else 1.0)
    return scores if clip is None else scores.clamp(-clip, clip)
