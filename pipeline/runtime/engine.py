"""One engine, whatever shards it: plain, data parallel, DeepSpeed ZeRO-1/2/3 or FSDP2, behind the same few calls.

DeepSpeed keeps float32 weights here and computes under torch's autocast, as the other strategies do: its own bf16 mode
would round the policy's weights and make the first ratio differ from 1.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers.integrations import unset_hf_deepspeed_config

from pipeline.errors import UserError
from pipeline.runtime.weights import tied_names


class EngineError(UserError, ValueError):
    """What was asked does not go with how the run is sharded; the message names both."""


def is_deepspeed(accelerator: Accelerator) -> bool:
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def zero_stage(accelerator: Accelerator) -> int:
    """DeepSpeed's ZeRO stage, 0 without DeepSpeed."""
    return accelerator.state.deepspeed_plugin.zero_stage if is_deepspeed(accelerator) else 0


def strategy(accelerator: Accelerator) -> str:
    """How weights and optimiser are shared: single, ddp, zero1, zero2, zero3 or fsdp2."""
    if is_deepspeed(accelerator):
        return f"zero{zero_stage(accelerator)}"
    if accelerator.distributed_type == DistributedType.FSDP:
        return "fsdp2"
    return "ddp" if accelerator.num_processes > 1 else "single"


def precision(accelerator: Accelerator) -> str:
    """no, bf16 or fp16: the type of the forwards. Weights are float32 always."""
    if is_deepspeed(accelerator):
        return "bf16" if accelerator.state.deepspeed_plugin.deepspeed_config["torch_autocast"]["enabled"] else "no"
    return accelerator.mixed_precision


def adopt_deepspeed(accelerator: Accelerator) -> None:
    """Make DeepSpeed, where it is used, behave as the other strategies do.

    Its mixed precision becomes torch's autocast, and transformers loads whole models (the reference and the reward are
    replicated; it would otherwise shard every model it opens under ZeRO-3).

    Raises:
        EngineError: fp16, whose loss scale would need DeepSpeed's own half-precision weights.
    """
    if not is_deepspeed(accelerator):
        return
    asked = accelerator.mixed_precision
    if asked not in ("no", "bf16"):
        raise EngineError(f"mixed_precision={asked!r} does not go with DeepSpeed here; use bf16 or no.")
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    config["bf16"] = {"enabled": False}
    unset_hf_deepspeed_config()
    config["torch_autocast"] = {"enabled": asked == "bf16", "dtype": "bfloat16", "lower_precision_safe_modules": []}


def autocast(accelerator: Accelerator) -> contextlib.AbstractContextManager:
    """The precision of all forwards outside the engine; the engine's own forward has the same."""
    if is_deepspeed(accelerator):
        return torch.autocast(
            accelerator.device.type, torch.bfloat16, enabled=precision(accelerator) == "bf16", cache_enabled=True
        )
    return accelerator.autocast()


def moving_weights(accelerator: Accelerator) -> str | None:
    """Why a CUDA graph cannot read the policy's weights where they lie; None where they stay."""
    how = strategy(accelerator)
    return f"{how} moves the weights about" if how in ("zero3", "fsdp2") else None


def prepare_engine(
    accelerator: Accelerator,
    policy: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    microbatch_size: int,
    microbatches: int,
    max_grad_norm: float,
    outside: Iterable[nn.Parameter],
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Wrap policy and optimiser; sizes per worker and optimiser step come from the run, never from a DeepSpeed file.

    `outside` are parameters that the policy's forward reads itself, not through the module that owns them: ZeRO-3
    gathers no others with the policy.

    Raises:
        EngineError: wrapping took a trainable weight out of the optimizer, or parted weights that were one.
    """
    tied = tied_names(policy)
    if is_deepspeed(accelerator):
        accelerator.state.deepspeed_plugin.deepspeed_config.update(
            train_micro_batch_size_per_gpu=microbatch_size,
            gradient_accumulation_steps=microbatches,
            gradient_clipping=max_grad_norm,
            zero_force_ds_cpu_optimizer=False,  # torch's fused Adam needs no compiler at the start
        )
        accelerator.gradient_accumulation_steps = microbatches
    if zero_stage(accelerator) == 3:
        import deepspeed

        for parameter in outside:
            deepspeed.zero.register_external_parameter(policy, parameter)
    engine, optimizer = accelerator.prepare(policy, optimizer)
    _check_prepared(accelerator, policy, optimizer, tied)
    if strategy(accelerator) == "fsdp2":
        engine.forward = autocast(accelerator)(engine.forward)  # Accelerate and DeepSpeed do so for the others
        engine.reshards = accelerator.state.fsdp_plugin.reshard_after_forward  # for `gathered`
        _make_moments(engine, optimizer)
    return engine, optimizer


def _check_prepared(
    accelerator: Accelerator, policy: nn.Module, optimizer: torch.optim.Optimizer, tied: set[frozenset[str]]
) -> None:
    """Raise `EngineError` unless all that is trainable is in the optimizer and the tied weights are those of before."""
    inner = getattr(optimizer, "optimizer", optimizer)  # DeepSpeed's holds flat parts; which weights they are it knows
    groups = getattr(inner, "bit16_groups", None) or getattr(inner, "fp16_groups", None)
    groups = groups or [group["params"] for group in inner.param_groups]
    optimized = {id(parameter) for group in groups for parameter in group}
    trainable = {name: id(parameter) for name, parameter in policy.named_parameters() if parameter.requires_grad}
    wrong = [f"leaves {name} out of the optimizer" for name, known in trainable.items() if known not in optimized]
    wrong += [f"parts {' from '.join(sorted(names))}, which were one weight" for names in tied - tied_names(policy)]
    if wrong:
        raise EngineError(
            f"{strategy(accelerator)} as it is configured {wrong[0]}{' and more' if wrong[1:] else ''}; use a "
            f"configuration of accelerate_configs/."
        )


def _make_moments(engine: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Give Adam the state of no step taken.

    Asked for an empty state, to save it or to load over it, torch makes one by a step of zeros, which Adam would count.
    """
    inner = optimizer.optimizer
    get_optimizer_state_dict(engine, inner)
    for state in inner.state.values():
        state["step"].zero_()


def settle(
    accelerator: Accelerator, engine: nn.Module, optimizer: torch.optim.Optimizer, forward: Callable[[], object]
) -> None:
    """Let the engine find its final shape before it is used, by one backward of zeros.

    Data parallelism rearranges its buckets once, after the first backward, and the sum over more than two workers
    rounds by the place in a bucket: a resumed run would round its first gradient otherwise than the run it goes on
    from. FSDP2 takes the first module that runs for its root, and sampling goes around the engine.
    """
    if isinstance(engine, (nn.parallel.DistributedDataParallel, FSDPModule)):
        with autocast(accelerator):
            outputs = forward()
        accelerator.backward(0.0 * (outputs.loss + outputs.values.sum()))
        optimizer.zero_grad(set_to_none=True)


def accumulating(accelerator: Accelerator, engine: nn.Module, *, last: bool) -> contextlib.AbstractContextManager:
    """Context of a microbatch's forward and backward: workers exchange gradients with the last one only."""
    if last or is_deepspeed(accelerator):
        return contextlib.nullcontext()
    return accelerator.no_sync(engine)


def backward(accelerator: Accelerator, engine: nn.Module, loss: Tensor, *, last: bool) -> None:
    """Add the gradient of `loss`; gradients are averaged over the workers and summed over microbatches."""
    if is_deepspeed(accelerator):
        engine.set_gradient_accumulation_boundary(last)
        engine.backward(loss, scale_wrt_gas=False)
    else:
        accelerator.backward(loss)


def optimizer_step(
    accelerator: Accelerator, engine: nn.Module, optimizer: torch.optim.Optimizer, max_grad_norm: float
) -> Tensor:
    """Clip, step, clear; returns the gradient's global norm before clipping.

    Where that is not finite the step is skipped, on every worker, and weights and moments stay as they are.
    """
    if is_deepspeed(accelerator):
        engine.step()  # clips by its configuration
        return torch.as_tensor(engine.get_global_grad_norm(), device=accelerator.device)
    norm = accelerator.clip_grad_norm_(engine.parameters(), max_grad_norm)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    inner = getattr(optimizer, "optimizer", optimizer)
    if accelerator.scaler is not None:  # float16: skips by itself, and must hear of each overflow to lower its scale
        optimizer.step()
    elif getattr(inner, "_step_supports_amp_scaling", False):
        inner.found_inf = (~norm.isfinite()).float()  # fused Adam skips by itself, and nobody waits for the device
        optimizer.step()
    elif norm.isfinite():
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def check_can_shard_reference(accelerator: Accelerator) -> None:
    """Raise `EngineError` where `shard_reference` was asked for without ZeRO-3."""
    if zero_stage(accelerator) != 3:
        raise EngineError(
            f"shard_reference=True needs ZeRO-3, and this run is {strategy(accelerator)}: ./launch.sh --config zero3 …"
        )


def check_can_compile(accelerator: Accelerator) -> None:
    """Raise `EngineError` where `torch_compile` was asked for and weights come and go with each block."""
    if strategy(accelerator) in ("zero3", "fsdp2"):
        raise EngineError(
            f"torch_compile=True does not go with {strategy(accelerator)}, which gathers each block's weights in "
            f"between; leave it false, or use --config zero2."
        )


def shard_frozen(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """Share a frozen model's weights out over the workers, in place; returns the engine for `gathered`.

    Raises:
        EngineError: see `check_can_shard_reference`.
    """
    check_can_shard_reference(accelerator)
    import deepspeed

    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    engine, *_ = deepspeed.initialize(model=model, config=settings)
    engine.eval()  # which, unlike a module's, gives nothing
    return engine


@contextlib.contextmanager
def gathered(engine: nn.Module) -> Iterator[None]:
    """A context in which every worker holds all of a sharded engine's weights, to read and not to change.

    Sampling reads every weight once a token: gathering them layer by layer, as a training forward does, would move the
    whole model over the network for each. So they are gathered once, and the engine's hooks stay out of the way.
    """
    with contextlib.ExitStack() as stack:
        if hasattr(engine, "zero_optimization_partition_weights") and engine.zero_optimization_partition_weights():
            import deepspeed
            from trl.models.utils import add_hooks, remove_hooks

            stack.enter_context(deepspeed.zero.GatheredParameters(list(engine.parameters())))
            remove_hooks(engine)
            stack.callback(add_hooks, engine)
        else:
            sharded = [module for module in engine.modules() if isinstance(module, FSDPModule)]
            for module in sharded:
                module.set_reshard_after_forward(False, recurse=False)
                module.unshard()
                stack.callback(module.reshard)
                # The root's weights stay from forward to backward, as where nothing was set.
                reshards = module is not engine and engine.reshards
                stack.callback(module.set_reshard_after_forward, reshards, recurse=False)
        yield


def full_state_dict(accelerator: Accelerator, engine: nn.Module) -> dict[str, Tensor]:
    """All of the policy's weights, whole, by name, for rank zero to save; other workers may get none. Collective.

    What only reads weights where they are finds them there, see `gathered`.
    """
    policy = accelerator.unwrap_model(engine)
    if isinstance(engine, FSDPModule):  # whose own state_dict() parts again what was gathered
        weights = get_model_state_dict(policy, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    elif zero_stage(accelerator) == 3:
        with gathered(engine):
            mine = policy.state_dict() if accelerator.is_main_process else {}
            weights = {name: tensor.to("cpu", copy=True) for name, tensor in mine.items()}
    else:
        return policy.state_dict()
    for tied in tied_names(policy):  # one tensor again, as whoever writes them expects
        weights.update({name: weights[min(tied)] for name in tied if weights})
    return weights
