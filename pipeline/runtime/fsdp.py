"""FSDP2 as the other strategies behave, whatever an accelerate configuration says of it."""

import os

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch.distributed.fsdp import StateDictType

from pipeline.runtime.engine import EngineError


def adopt_fsdp(accelerator: Accelerator) -> None:
    """Make FSDP2, where it is used, behave as the other strategies do.

    Forwards run under torch's autocast, over float32 weights: Accelerate's own policy would round log-probs, values and
    gradients to the half precision. Every worker loads whole models: `accelerate launch` asks by default that only the
    first does, and then the policy is shared out in a way that parts GPT-2's head from its embedding.

    Raises:
        EngineError: the configuration asks for what FSDP2 cannot do here; the message says what to write instead.
    """
    if accelerator.distributed_type != DistributedType.FSDP:
        return
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise EngineError(f"fsdp_version={plugin.fsdp_version} is not supported; write fsdp_version: 2.")
    if plugin.state_dict_type != StateDictType.SHARDED_STATE_DICT:
        raise EngineError(
            f"fsdp_state_dict_type={plugin.state_dict_type.name} is not supported: each worker writes its own part "
            f"of a checkpoint; write fsdp_state_dict_type: SHARDED_STATE_DICT."
        )
    if plugin.activation_checkpointing:
        raise EngineError(
            "fsdp_activation_checkpointing=True is not supported; write false, and use --gradient_checkpointing true."
        )
    plugin.mixed_precision_policy = None
    plugin.cpu_ram_efficient_loading = False
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # transformers reads it there
