"""The policy update: epochs of minibatches over one rollout batch, each minibatch one optimiser step."""

import math
import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from pipeline.config import PPOSettings
from pipeline.models.forward import output_head
from pipeline.models.packing import Layout, Packed, pack
from pipeline.models.policy import Policy
from pipeline.ppo.advantages import Advantages
from pipeline.ppo.losses import PPOLoss, policy_losses, ppo_loss
from pipeline.rollout.rollout import PolicyOutputs, Responses, Rollout, concatenated
from pipeline.runtime.determinism import deterministic
from pipeline.runtime.distributed import gather_fields, reduce_stats, share
from pipeline.runtime.engine import accumulating, autocast, backward, optimizer_step, prepare_engine, settle
from pipeline.runtime.randomness import generator

SUMS = ("policy_loss", "value_loss", "policy_clipped", "value_clipped", "approx_kl", "ratio")


@dataclass(frozen=True)
class UpdateStats:
    """Means over all tokens of all minibatches whose gradient was finite, the same on every worker."""

    policy_loss: float
    value_loss: float
    policy_clip_fraction: float
    value_clip_fraction: float
    approx_kl: float  # KL(old || new) per token, nats
    ratio_mean: float
    ratio_max: float
    first_minibatch_ratio_deviation: float  # largest |ratio - 1| before any update: 0 on policy
    gradient_norm: float  # mean before clipping
    epochs: int
    applied: tuple[bool, ...]  # of each optimiser step: whether it was taken, its gradient being finite


def learning_rate_at(step: int, settings: PPOSettings) -> float:
    """The learning rate of PPO step `step` (from 0): a function, so there is no scheduler state to save."""
    warm = min(1.0, (step + 1) / (settings.warmup_steps + 1))
    left = (settings.steps - step) / settings.steps if settings.learning_rate_schedule == "linear" else 1.0
    return settings.learning_rate * min(warm, 1.0) * left


def prepare_update(
    accelerator: Accelerator, policy: Policy, settings: PPOSettings
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The policy as an engine, and Adam over what of it is trainable: what `update_policy` needs."""
    if settings.gradient_checkpointing:
        policy.recompute()
    if settings.torch_compile:
        policy.compile_trunk()
    optimizer = torch.optim.AdamW(
        [parameter for parameter in policy.parameters() if parameter.requires_grad],
        lr=settings.learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_eps,
        weight_decay=0.0,
        fused=True,
    )
    tokens = torch.zeros(1, 3, dtype=torch.long, device=accelerator.device)
    packed = pack(tokens, np.array([[1, 2]]), 2, policy.layout)
    if accelerator.device.type == "cuda":
        with autocast(accelerator):
            policy.repeatable = _is_repeatable(policy, packed)
    mine = settings.minibatch_size // accelerator.num_processes
    engine, optimizer = prepare_engine(
        accelerator,
        policy,
        optimizer,
        microbatch_size=min(settings.microbatch_size, mine),
        microbatches=math.ceil(mine / settings.microbatch_size),
        max_grad_norm=settings.max_grad_norm,
        outside=output_head(policy.model).parameters(),
    )
    settle(accelerator, engine, optimizer, lambda: engine(packed, token_loss=lambda logprobs, _rows: logprobs))
    return engine, optimizer


def _is_repeatable(policy: Policy, packed: Packed) -> bool:
    """Whether the gradients can be the same bits each time, found out by trying; warns where they cannot."""
    trainable = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    small = [parameter for parameter in trainable if parameter.ndim == 1]  # at both ends of each block, and no memory
    try:
        with deterministic(packed.tokens.device):
            outputs = policy(packed, token_loss=lambda logprobs, _rows: logprobs)
            torch.autograd.grad(outputs.loss + outputs.values.sum(), small or trainable, allow_unused=True)
    except RuntimeError as error:
        if "determinis" not in str(error):
            raise
        warnings.warn(f"the same training will not end with the same bits: {str(error).splitlines()[0]}", stacklevel=2)
        return False
    return True


def _repeatable(engine: nn.Module, device: torch.device) -> AbstractContextManager[None]:
    """A context of forwards and backwards that give the same bits each time, where the model has that."""
    return deterministic(device) if getattr(engine, "module", engine).repeatable else nullcontext()


def update_policy(
    accelerator: Accelerator,
    engine: nn.Module,
    optimizer: torch.optim.Optimizer,
    rollout: Rollout,
    advantages: Advantages,
    settings: PPOSettings,
    *,
    step: int,
    seed: int,
    temperature: float,
    layout: Layout,
) -> UpdateStats:
    """Run the epochs of PPO step `step` on the global rollout batch.

    Every worker holds the whole batch and takes its slice of each minibatch of one global permutation. Losses are sums
    over tokens divided by the global minibatch's token count, so neither the number of workers nor the microbatch size
    changes the gradient.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate_at(step, settings)
    device = rollout.tokens.device
    lengths = rollout.lengths()
    sums = torch.zeros(len(SUMS) + 1, device=device)  # and the tokens they are over
    maxima = torch.zeros(2, device=device)
    norms: list[Tensor] = []
    epochs = 0
    for epoch in range(settings.ppo_epochs):
        order = _permutation(seed, epoch, step, len(rollout))
        epoch_sums = torch.zeros_like(sums)
        for start in range(0, len(order), settings.minibatch_size):
            minibatch = order[start : start + settings.minibatch_size]
            mine = minibatch[share(accelerator, len(minibatch))]
            tokens = int(lengths[minibatch, 1].sum())
            first = not norms
            minibatch_sums, minibatch_maxima = torch.zeros_like(sums), torch.zeros_like(maxima)
            for loss in _backward(
                accelerator,
                engine,
                rollout,
                advantages,
                settings,
                mine,
                lengths,
                tokens,
                temperature=temperature,
                layout=layout,
            ):
                minibatch_sums[:-1] += torch.stack([getattr(loss, name).detach().float() for name in SUMS])
                minibatch_maxima[0] = torch.maximum(minibatch_maxima[0], loss.ratio_max)
                if first:
                    minibatch_maxima[1] = torch.maximum(minibatch_maxima[1], loss.ratio_deviation)
            minibatch_sums[-1].fill_(tokens / accelerator.num_processes)  # an assignment would wait for a GPU
            norms.append(torch.as_tensor(optimizer_step(accelerator, engine, optimizer, settings.max_grad_norm)))
            finite = norms[-1].isfinite()
            epoch_sums += torch.where(finite, minibatch_sums, 0.0)
            maxima = torch.maximum(maxima, torch.where(finite, minibatch_maxima, 0.0))
        epochs += 1
        epoch_sums, maxima = reduce_stats(accelerator, epoch_sums, maxima)
        sums += epoch_sums
        epoch_kl = epoch_sums[SUMS.index("approx_kl")] / epoch_sums[-1].clamp_min(1)
        if settings.kl_early_stop is not None and epoch_kl > settings.kl_early_stop:
            break
    means = (sums[:-1] / sums[-1].clamp_min(1)).tolist()
    norms = torch.stack(norms).tolist()
    finite = [norm for norm in norms if math.isfinite(norm)]
    # With float16 the loss scale is found by overflowing, which is no fault.
    searching = getattr(accelerator, "scaler", None) is not None
    return UpdateStats(
        *means,
        *maxima.tolist(),
        gradient_norm=sum(finite) / max(1, len(finite)),
        epochs=epochs,
        applied=tuple(searching or math.isfinite(norm) for norm in norms),
    )


@torch.no_grad()
def first_epoch_outputs(
    accelerator: Accelerator,
    policy: Policy,
    responses: Responses,
    settings: PPOSettings,
    *,
    step: int,
    seed: int,
    temperature: float,
) -> PolicyOutputs:
    """What the policy says of the global batch, read in the first epoch's own microbatches of PPO step `step`.

    The update's first forward then repeats one of these with the same rows, so the first ratio is 1 also where rounding
    depends on them (bfloat16). Each worker reads its share; the result is gathered.
    """
    lengths = responses.lengths()
    order = _permutation(seed, 0, step, len(responses))
    parts = []
    for start in range(0, len(order), settings.minibatch_size):
        minibatch = order[start : start + settings.minibatch_size]
        mine = minibatch[share(accelerator, len(minibatch))]
        for first in range(0, len(mine), settings.microbatch_size):
            index = mine[first : first + settings.microbatch_size]
            tokens = responses.tokens[torch.from_numpy(index).to(responses.tokens.device, non_blocking=True)]
            packed = pack(tokens, lengths[index], responses.response_tokens.shape[1], policy.layout)
            with _repeatable(policy, tokens.device):
                outputs = policy(packed, temperature, with_entropy=True)
            read = (outputs.logprobs, outputs.values, outputs.entropy)
            parts.append(PolicyOutputs(*(packed.unpack(x) for x in read)))
    gathered = gather_fields(accelerator, concatenated(parts))
    minibatches = order.reshape(-1, accelerator.num_processes, settings.minibatch_size // accelerator.num_processes)
    place = torch.from_numpy(np.argsort(minibatches.swapaxes(0, 1).ravel())).to(responses.tokens.device)
    return PolicyOutputs(*(getattr(gathered, field.name)[place] for field in fields(gathered)))


def _permutation(seed: int, epoch: int, step: int, count: int) -> np.ndarray:
    return generator(seed, f"minibatches of epoch {epoch}", step).permutation(count)


def _backward(
    accelerator: Accelerator,
    engine: nn.Module,
    rollout: Rollout,
    advantages: Advantages,
    settings: PPOSettings,
    mine: np.ndarray,
    lengths: np.ndarray,
    minibatch_tokens: int,
    *,
    temperature: float,
    layout: Layout,
) -> list[PPOLoss]:
    """Accumulate this worker's part of one minibatch's gradient; workers exchange it with the last microbatch only."""
    losses = []
    # Data parallelism averages gradients over the workers; the minibatch wants their sum.
    scale = accelerator.num_processes / minibatch_tokens
    for start in range(0, len(mine), settings.microbatch_size):
        index = mine[start : start + settings.microbatch_size]
        where = torch.from_numpy(index).to(rollout.tokens.device, non_blocking=True)
        part = rollout.take(where)
        packed = pack(part.tokens, lengths[index], part.response_tokens.shape[1], layout)
        old_logprobs, old_values = packed.take(part.logprobs), packed.take(part.values)
        token_advantages, returns = (packed.take(x[where]) for x in (advantages.advantages, advantages.returns))

        def token_loss(logprobs: Tensor, rows: slice, old=old_logprobs, advantage=token_advantages) -> Tensor:
            return policy_losses(logprobs, old[rows], advantage[rows], settings.clip_range)

        last = start + settings.microbatch_size >= len(mine)
        with accumulating(accelerator, engine, last=last), _repeatable(engine, where.device):
            outputs = engine(packed, temperature, token_loss=token_loss, scale=scale)
            loss = ppo_loss(
                outputs.logprobs,
                outputs.values,
                old_logprobs,
                old_values,
                token_advantages,
                returns,
                clip_range=settings.clip_range,
                value_clip_range=settings.value_clip_range,
                value_coef=settings.value_coef,
            )
            total = outputs.loss + settings.value_coef * scale * loss.value_loss
            backward(accelerator, engine, total, last=last)
        losses.append(loss)
    return losses
