"""Compare a finished run's model with the original on held-out prompts.

    python -m pipeline.evaluate runs/quickstart
    python -m pipeline.evaluate runs/quickstart --evaluation_prompts 2000

The run's own config.yaml says how; settings given here win over it. Prints the comparison and writes evaluation.json,
evaluation.md and plane.png into the run's directory, as the end of every training does.
"""

import sys
from pathlib import Path

from accelerate import Accelerator

from pipeline.assembly import (
    Data,
    Parts,
    choose_rollout_microbatch,
    open_data,
    open_frontier,
    open_reward,
    open_run,
    open_tuned,
)
from pipeline.config import Config, ConfigError
from pipeline.errors import end_worker, user_errors
from pipeline.evaluation import evaluate
from pipeline.reporting import show_evaluation
from pipeline.runtime.console import Console
from pipeline.runtime.distributed import all_or_none, make_accelerator


def main() -> None:
    if {"-h", "--help"} & set(sys.argv[1:2]):
        print(__doc__)
        return
    with user_errors():
        run, config = read_arguments(sys.argv[1:])
        accelerator = make_accelerator(config.run.mixed_precision)
        data, parts = all_or_none(accelerator, lambda: prepare(run, config, accelerator))
        choose_rollout_microbatch(config, accelerator, parts.policy, config.run.evaluation_prompts)
        evaluation = evaluate(
            accelerator,
            parts.policy,
            parts.reference,
            parts.reward,
            data.tokenizer,
            data.held_out,
            config,
            parts.frontier,
        )
    if accelerator.is_main_process:
        show_evaluation(Console(0, enabled=True), evaluation, run)
    accelerator.wait_for_everyone()
    end_worker()


def read_arguments(arguments: list[str]) -> tuple[Path, Config]:
    """Read the run's directory and its settings; raises `ConfigError`."""
    if not arguments or arguments[0].startswith("-"):
        raise ConfigError("name the run to evaluate: python -m pipeline.evaluate runs/quickstart [--setting value …]")
    run, config = open_run(__doc__, arguments[0], arguments[1:])
    if config.run.evaluation_prompts < 1:
        raise ConfigError("evaluation_prompts=0 leaves nothing to evaluate; give --evaluation_prompts 512.")
    return run, config


def prepare(run: Path, config: Config, accelerator: Accelerator) -> tuple[Data, Parts]:
    """Load the prompts, the reward and both models; raises `UserError`."""
    data = open_data(config)
    reward = open_reward(config, data, accelerator.device)
    policy, reference = open_tuned(run, config, accelerator.device)
    return data, Parts(policy, reference, reward, open_frontier(config, reference))


if __name__ == "__main__":
    main()
