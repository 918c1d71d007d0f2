"""What does not go with a way of sharding is refused by name."""

from types import SimpleNamespace

import pytest
from accelerate.utils import DistributedType

from pipeline.runtime.engine import EngineError, check_can_compile, moving_weights


def accelerator(kind, stage=0, processes=2):
    plugin = SimpleNamespace(zero_stage=stage)
    return SimpleNamespace(
        distributed_type=kind, num_processes=processes, state=SimpleNamespace(deepspeed_plugin=plugin)
    )


@pytest.mark.parametrize(
    ("kind", "stage", "name"), [(DistributedType.DEEPSPEED, 3, "zero3"), (DistributedType.FSDP, 0, "fsdp2")]
)
def test_blocks_whose_weights_come_and_go_are_not_compiled(kind, stage, name):
    with pytest.raises(EngineError, match=f"torch_compile=True does not go with {name}"):
        check_can_compile(accelerator(kind, stage))


@pytest.mark.parametrize(("kind", "stage"), [(DistributedType.DEEPSPEED, 2), (DistributedType.MULTI_GPU, 0)])
def test_blocks_whose_weights_stay_may_be_compiled(kind, stage):
    check_can_compile(accelerator(kind, stage))


@pytest.mark.parametrize(
    ("kind", "stage", "processes", "why"),
    [
        (DistributedType.NO, 0, 1, None),
        (DistributedType.MULTI_GPU, 0, 2, None),
        (DistributedType.DEEPSPEED, 1, 2, None),
        (DistributedType.DEEPSPEED, 2, 2, None),
        (DistributedType.DEEPSPEED, 3, 2, "zero3 moves the weights about"),
        (DistributedType.FSDP, 0, 2, "fsdp2 moves the weights about"),
    ],
)
def test_graphs_go_with_what_leaves_the_weights_in_their_place(kind, stage, processes, why):
    assert moving_weights(accelerator(kind, stage, processes)) == why
