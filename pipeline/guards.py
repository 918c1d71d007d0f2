"""Guards: what no healthy step does, and when a run has to stop."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.config import PPOSettings
from pipeline.errors import UserError

IN_A_ROW = 3  # bad steps, or skipped optimiser steps, that end a run


class GuardError(UserError):
    """Training went wrong `IN_A_ROW` times in a row; the message says how and what may help."""


@dataclass
class Guards:
    """What is remembered from step to step; the same on every worker."""

    first_entropy: float | None = None  # nats a token, of the first step
    bad: int = 0  # steps in a row up to now
    skipped: int = 0  # optimiser steps in a row up to now
    learned: bool = False  # whether an optimiser step was ever taken

    @property
    def content(self) -> bool:
        """Whether the state after the last step is a good one, worth a checkpoint."""
        return self.bad == 0 and self.skipped == 0

    def check(self, settings: PPOSettings, metrics: Mapping[str, float], applied: Sequence[bool]) -> list[str]:
        """What is wrong with the step of these metrics, a sentence each; none where all is well.

        Args:
            applied: for each optimiser step of the update, whether it was taken: its gradient was finite.

        Raises:
            GuardError: it was too often in a row.
        """
        told = self._gradients(settings, applied, spoilt_model(metrics))
        wrong = self._policy(settings, metrics)
        self.bad = self.bad + 1 if wrong else 0
        if self.bad == IN_A_ROW:
            raise GuardError(
                f"{IN_A_ROW} bad steps in a row, the last one: {'; '.join(wrong)}. Lower learning_rate="
                f"{settings.learning_rate:g}, or raise kl_coef={settings.kl_coef:g}, and start over (--resume never)."
            )
        return told + wrong

    def _gradients(self, settings: PPOSettings, applied: Sequence[bool], spoilt: str | None) -> list[str]:
        for taken in applied:
            self.skipped = 0 if taken else self.skipped + 1
            self.learned = self.learned or taken
            if self.skipped == IN_A_ROW and not self.learned:
                raise GuardError(
                    f"loss or gradient was NaN or infinite in each of the first {IN_A_ROW} optimiser steps, before "
                    f"anything was learned: not learning_rate is at fault, but the model's weights, the size of the "
                    f"reward, or the precision (--mixed_precision no)."
                )
            if self.skipped == IN_A_ROW:
                raise GuardError(
                    f"loss or gradient was NaN or infinite in {IN_A_ROW} optimiser steps in a row, which were skipped"
                    f"{f', since {spoilt}' if spoilt else ''}. "
                    f"Lower learning_rate={settings.learning_rate:g}, or use --mixed_precision no, and start over "
                    f"(--resume never)."
                )
        missing = sum(not taken for taken in applied)
        if not missing:
            return []
        return [f"{missing} of {len(applied)} optimiser steps skipped: their loss or gradient was NaN or infinite"]

    def _policy(self, settings: PPOSettings, metrics: Mapping[str, float]) -> list[str]:
        spoilt = spoilt_model(metrics)
        if spoilt is not None:  # then the other figures say nothing
            return [spoilt]
        if self.first_entropy is None:
            self.first_entropy = metrics["ppo/entropy"]
        wrong = []

        def require(holds: bool, sentence: str) -> None:
            if not holds:  # NaN holds nothing
                wrong.append(sentence)

        moved, kl, entropy = metrics["ppo/approx_kl"], metrics["kl/sequence_k1"], metrics["ppo/entropy"]
        if settings.guard_update_kl is not None:
            require(
                moved <= settings.guard_update_kl,
                f"the ratios explode: the update moved the policy by {moved:.3g} nats a token (guard_update_kl="
                f"{settings.guard_update_kl:g}), the largest ratio is {metrics['ppo/ratio_max']:.3g}",
            )
        if settings.guard_kl is not None:
            require(
                kl <= settings.guard_kl,
                f"the KL from the reference is {kl:.3g} nats a response (guard_kl={settings.guard_kl:g})",
            )
        if settings.guard_entropy is not None:
            require(
                entropy >= settings.guard_entropy * self.first_entropy,
                f"the entropy has collapsed from {self.first_entropy:.3g} to {entropy:.3g} nats a token "
                f"(guard_entropy={settings.guard_entropy:g} of the first)",
            )
        return wrong


def spoilt_model(metrics: Mapping[str, float]) -> str | None:
    """Which model's logits were NaN or infinite in the step of these metrics, as a sentence; None where neither's were.

    Sampling goes on from such logits, since it cannot stop on a device without waiting for it: here is where it shows.
    """
    for model, figure in (("policy", "ppo/entropy"), ("reference", "kl/sequence_k1")):
        if not math.isfinite(metrics[figure]):
            return f"the {model}'s logits are NaN or infinite"
    return None
