"""The PPO loop: rollout, score, gather, advantages, update, report. Each step is a method below, in that order."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext

from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pipeline.config import Config
from pipeline.data.prompts import Openings, PromptBatch, prompt_batch
from pipeline.data.tokens import start_ids
from pipeline.guards import Guards
from pipeline.metrics import StepReport, part_metrics, step_metrics, step_report
from pipeline.models.policy import Policy, Reference
from pipeline.models.vocabulary import eos_token_ids
from pipeline.phases import Phases
from pipeline.ppo.advantages import Advantages, compute_advantages
from pipeline.ppo.kl import adapted_kl_coef, kl_estimate
from pipeline.rewards.composed import ComposedReward
from pipeline.rewards.reading import Reading, read
from pipeline.rewards.scaling import RunningMoments, shaped_scores
from pipeline.rollout.graphs import DecodeGraphs
from pipeline.rollout.rollout import (
    PolicyOutputs,
    Responses,
    Rollout,
    Scored,
    response_texts,
    sample_responses,
    sample_text,
)
from pipeline.rollout.sampling import sampling_noise, sampling_options
from pipeline.runtime.distributed import agreed_signal, all_or_none, gather_fields, peak_memory_gigabytes, share
from pipeline.runtime.engine import autocast, gathered, moving_weights, precision
from pipeline.runtime.overlap import alongside
from pipeline.runtime.profiling import profiled
from pipeline.runtime.signals import StopRequest
from pipeline.update import UpdateStats, first_epoch_outputs, learning_rate_at, prepare_update, update_policy

SAMPLES_SHOWN = 2  # of a step


class PPOTrainer:
    """PPO on one policy. The small data is replicated: every worker holds the whole rollout batch."""

    def __init__(
        self,
        accelerator: Accelerator,
        policy: Policy,
        reference: Reference,
        reward: ComposedReward,
        tokenizer: PreTrainedTokenizerBase,
        openings: Openings,
        config: Config,
        stop: StopRequest,
    ):
        self.accelerator = accelerator
        self.policy = policy
        self.engine, self.optimizer = prepare_update(accelerator, policy, config.ppo)
        self.reference = reference
        self.reward = reward
        self.tokenizer = tokenizer
        self.eos_token_ids = eos_token_ids(policy.model, tokenizer)
        self.openings = openings
        self.config = config
        # Decoding token by token equals a forward over the whole to float32's rounding, and not to bfloat16's.
        self.keeps_outputs = precision(accelerator) == "no"
        self.graphs = DecodeGraphs(moving_weights(accelerator))
        self.kl_coef = config.ppo.kl_coef
        self.moments = RunningMoments() if config.reward.reward_scaling else None
        self.part_moments = [RunningMoments() for _ in reward.names] if config.reward.reward_whitening else None
        self.guards = Guards()
        self.stop = stop
        self.stopped_by = 0  # number of the signal that ended the loop early
        self.finished = 0  # steps done
        self.phases = Phases(config, accelerator.device)

    def state(self) -> dict[str, object]:
        """What a checkpoint holds of the loop beside weights and optimiser; randomness needs none of it."""
        return {
            "step": self.finished,
            "kl_coef": self.kl_coef,
            "moments": None if self.moments is None else vars(self.moments),
            "part_moments": None if self.part_moments is None else [vars(m) for m in self.part_moments],
            "guards": vars(self.guards),
        }

    def restore(self, state: Mapping[str, object]) -> None:
        """Go on after the step at which `state` was taken."""
        self.finished, self.kl_coef = state["step"], state["kl_coef"]
        if self.moments is not None:
            self.moments = RunningMoments(**state["moments"])
        if self.part_moments is not None:
            self.part_moments = [RunningMoments(**moments) for moments in state["part_moments"]]
        self.guards = Guards(**state.get("guards", {}))

    def train(
        self, report: Callable[[StepReport], None], keep: Callable[[], None], warn: Callable[[str], None]
    ) -> None:
        """Run the steps that are left, until the last or a signal; `keep`, called after each, may write a checkpoint.

        It is not called after a bad step; `warn` is told of it. A step is taken even where the signal came before it.

        Raises:
            RewardError: the reward broke its contract; the policy keeps what it learned until then.
            GuardError: too many bad steps in a row.
        """
        for step in range(self.finished, self.config.ppo.steps):
            self.phases.seconds.clear()
            with self._profiled(step + 1), self.phases.timed("step"):
                prompts = self.draw_prompts(step)
                with gathered(self.engine):
                    with self.phases.timed("sample"):
                        responses, outputs = self.sample(step, prompts)
                    scoring = self.start_scoring(prompts, responses)
                    with self.phases.timed("reference"):
                        reading = self.read(responses)
                    with self.phases.timed("score"):
                        parts = self.score(scoring, reading, responses)
                    rollout = self.gather(step, responses, reading, parts, outputs)
                advantages = self.advantages(rollout)
                with self.phases.timed("update"):
                    stats = self.update(step, rollout, advantages)
            metrics = self.metrics(step, rollout, advantages, stats)
            self.adapt_kl_coef(metrics["kl/sequence_k1"])
            report(self.report(step, metrics, rollout, prompts))
            self.finished = step + 1
            for problem in self.guards.check(self.config.ppo, metrics, stats.applied):
                warn(f"step {step + 1}: {problem}")
            if self.guards.content:
                keep()
            if self.stop_requested():  # not before a step: a job that is stopped and requeued again and again gets on
                return

    def stop_requested(self) -> bool:
        """Whether a signal reached any worker: collective, the same answer on all."""
        self.stopped_by = self.stopped_by or agreed_signal(self.accelerator, self.stop.signal_number)
        return self.stopped_by != 0

    def draw_prompts(self, step: int) -> PromptBatch:
        """The global batch of prompts of `step`."""
        data = self.config.data
        return prompt_batch(
            self.openings,
            self.tokenizer,
            step=step,
            batch_size=self.config.rollout.rollout_batch_size,
            min_tokens=data.prompt_min_tokens,
            max_tokens=data.prompt_max_tokens,
            pad_token_id=self.tokenizer.pad_token_id,
            seed=self.config.run.seed,
        )

    def sample(self, step: int, prompts: PromptBatch) -> tuple[Responses, PolicyOutputs | None]:
        """This worker's share of the responses; in float32 the policy's log-probs and values of them as well."""
        rollout, seed = self.config.rollout, self.config.run.seed
        mine = share(self.accelerator, len(prompts))
        uniforms, lengths = sampling_noise(
            seed, step, len(prompts), rollout.response_min_tokens, rollout.response_max_tokens
        )
        with autocast(self.accelerator):
            return sample_responses(
                self.policy.model,
                prompts.slice(mine.start, mine.stop),
                uniforms[mine],
                lengths[mine],
                microbatch_size=rollout.rollout_microbatch_size,
                eos_token_id=self.eos_token_ids,
                pad_token_id=self.tokenizer.pad_token_id,
                options=sampling_options(rollout),
                value_head=self.policy.value_head if self.keeps_outputs else None,
                graphs=self.graphs,
            )

    def start_scoring(self, prompts: PromptBatch, responses: Responses) -> Callable[[], dict[str, Tensor]]:
        """What gives the raw scores (n,) of this worker's responses by the components that judge texts.

        Beside a GPU the texts are made, tokenized and scored while the reference reads the same responses.
        """
        texts = prompts.text[share(self.accelerator, len(prompts))]

        def score() -> dict[str, Tensor]:
            with autocast(self.accelerator):
                return self.reward.text_scores(texts, response_texts(responses, texts, self.tokenizer))

        return alongside(self.accelerator.device, score)

    def score(self, scoring: Callable[[], dict[str, Tensor]], reading: Reading, responses: Responses) -> Tensor:
        """Raw scores (n, K) of this worker's responses by the reward's K components."""

        def raw() -> Tensor:
            parts = self.reward.raw(scoring(), reading)
            if self.moments is self.part_moments is self.config.reward.reward_clip is None:
                self.reward.check_size(parts, lambda i: sample_text(responses, i, self.tokenizer))
            return parts

        return all_or_none(self.accelerator, raw)

    def read(self, responses: Responses) -> Reading:
        """What the reference says of this worker's responses."""
        rollout = self.config.rollout
        with autocast(self.accelerator):
            return read(
                self.reference,
                responses,
                unprompted=self.reward.unprompted,
                start_ids=start_ids(self.tokenizer),
                temperature=rollout.temperature,
                microbatch_size=rollout.rollout_microbatch_size,
            )

    def gather(
        self, step: int, responses: Responses, reading: Reading, parts: Tensor, outputs: PolicyOutputs | None
    ) -> Rollout:
        """The global rollout batch, in the order of the prompts, on every worker.

        Where sampling kept no outputs of the policy, they are read here: by each worker those it will train on first.
        """
        parts = parts.to(self.accelerator.device)
        scored = gather_fields(self.accelerator, Scored(**vars(responses), ref_logprobs=reading.logprobs, parts=parts))
        if outputs is not None:
            outputs = gather_fields(self.accelerator, outputs)
        else:
            with self.phases.timed("forward"), autocast(self.accelerator):
                outputs = first_epoch_outputs(
                    self.accelerator,
                    self.policy,
                    scored,
                    self.config.ppo,
                    step=step,
                    seed=self.config.run.seed,
                    temperature=self.config.rollout.temperature,
                )
        return Rollout(**vars(scored), **vars(outputs), weighted=self.reward.weighted(scored.parts, self.part_moments))

    def advantages(self, rollout: Rollout) -> Advantages:
        """Rewards with the KL penalty, GAE, whitening over the global batch."""
        ppo = self.config.ppo
        return compute_advantages(
            shaped_scores(rollout.scores, self.moments, self.config.reward.reward_clip),
            kl_estimate(rollout.logprobs, rollout.ref_logprobs, "k1"),
            rollout.values,
            rollout.response_mask,
            kl_coef=self.kl_coef,
            gamma=ppo.gamma,
            gae_lambda=ppo.gae_lambda,
        )

    def update(self, step: int, rollout: Rollout, advantages: Advantages) -> UpdateStats:
        """Epochs of minibatches."""
        return update_policy(
            self.accelerator,
            self.engine,
            self.optimizer,
            rollout,
            advantages,
            self.config.ppo,
            step=step,
            seed=self.config.run.seed,
            temperature=self.config.rollout.temperature,
            layout=self.policy.layout,
        )

    def adapt_kl_coef(self, kl: float) -> None:
        """Move the KL coefficient towards its target where the recipe asks for it."""
        ppo, samples = self.config.ppo, self.config.rollout.rollout_batch_size
        if ppo.kl_adaptive:
            target = ppo.kl_target
            self.kl_coef = adapted_kl_coef(self.kl_coef, kl, target=target, horizon=ppo.kl_horizon, samples=samples)

    def metrics(self, step: int, rollout: Rollout, advantages: Advantages, stats: UpdateStats) -> dict[str, float]:
        """All figures of a step under their public names."""
        return {
            **step_metrics(rollout, advantages, self.eos_token_ids),
            **(part_metrics(rollout, self.reward.names) if self.reward.is_sum else {}),
            "step": step + 1,
            "episodes": (step + 1) * len(rollout),
            "kl/coef": self.kl_coef,
            "ppo/learning_rate": learning_rate_at(step, self.config.ppo),
            **{f"ppo/{name}": value for name, value in vars(stats).items() if name != "applied"},
            "ppo/optimizer_steps": sum(stats.applied),
            "ppo/skipped_steps": len(stats.applied) - sum(stats.applied),
            **{f"time/{name}_seconds": seconds for name, seconds in self.phases.seconds.items()},
            "memory/peak_gigabytes": peak_memory_gigabytes(self.accelerator.device),
            "throughput/samples_per_second": len(rollout) / self.phases.seconds["step"],
            "throughput/tokens_per_second": rollout.response_mask.sum().item() / self.phases.seconds["step"],
        }

    def report(self, step: int, metrics: dict[str, float], rollout: Rollout, prompts: PromptBatch) -> StepReport:
        """A step's figures with the first responses of the batch."""
        texts = prompts.text[:SAMPLES_SHOWN]
        responses = response_texts(rollout.take(slice(0, SAMPLES_SHOWN)), texts, self.tokenizer)
        return step_report(step + 1, metrics, rollout, self.reward.names, texts, responses)

    def _profiled(self, step: int) -> AbstractContextManager[None]:
        if step != self.config.run.profile or not self.accelerator.is_main_process:
            return nullcontext()
        return profiled(self.config.output_dir / "profile", step)
