"""Estimate the best reward at each KL of a recipe: what a perfect policy could do with its reference and reward.

    ./launch.sh frontier recipes/quickstart.yaml    # writes runs/frontiers/quickstart.json
    ./launch.sh recipes/quickstart.yaml             # its evaluation now says how far it is from that

Trains nothing: samples the reference (frontier_samples responses to each of frontier_prompts held-out prompts, in the
mean: more go where they are needed more) and weights the samples. Under accelerate launch the workers share the
sampling. --frontier names another file to write.
"""

from pathlib import Path

from pipeline.assembly import (
    choose_rollout_microbatch,
    open_data,
    open_reward,
    open_start,
    parse_config,
)
from pipeline.config import ConfigError
from pipeline.errors import end_worker, user_errors, worker_faults
from pipeline.frontier_samples import estimate_frontier
from pipeline.frontiers import DIRECTORIES, Frontier
from pipeline.runtime.console import Console
from pipeline.runtime.distributed import all_or_none, make_accelerator, on_main
from pipeline.runtime.signals import StopRequest


def main() -> None:
    with worker_faults(), user_errors(), StopRequest() as stop:
        config = parse_config(__doc__)
        if config.run.frontier == "none":
            raise ConfigError("frontier='none': name the file to write, or leave it out.")
        if config.reward.reward_whitening:
            raise ConfigError(
                "reward_whitening=True: what a response is worth changes while such a run goes on, so no reward is the "
                "best; set it to false for a frontier of the components as they are."
            )
        named = config.run.frontier != "auto"
        path = Path(config.run.frontier) if named else DIRECTORIES[0] / f"{config.output_dir.name}.json"
        accelerator = make_accelerator(config.run.mixed_precision)
        data = all_or_none(accelerator, lambda: open_data(config))
        console = Console(0, enabled=accelerator.is_main_process)
        for note in data.training.notes:
            console.say(note)
        reward = all_or_none(accelerator, lambda: open_reward(config, data, accelerator.device))
        policy, reference = all_or_none(accelerator, lambda: open_start(config, accelerator.device))
        choose_rollout_microbatch(config, accelerator, policy, config.run.frontier_prompts * accelerator.num_processes)
        frontier = estimate_frontier(
            accelerator, reference, reward, data.tokenizer, data.held_out, config, lambda: stop.check(accelerator)
        )
        on_main(accelerator, lambda: frontier.save(path))
        if accelerator.is_main_process:
            console.table("The best reward at each KL", frontier_table(frontier))
            console.say(f"Written to {path}")
        accelerator.wait_for_everyone()
    end_worker()


def frontier_table(frontier: Frontier, rows: int = 12) -> list[list[str]]:
    """Points of the trusted curve as rows of cells, the first row the header."""
    table = [["KL, nats", "reward", "price of a nat", "effective samples, median"]]
    last = int(frontier.trusted.sum())
    rewards, kls = frontier.rewards.mean(0), frontier.kls.mean(0)
    shown = sorted({round(i * (last - 1) / max(1, rows - 1)) for i in range(rows)}) if last else []
    for i in shown:
        median = sorted(frontier.effective_samples[:, i])[len(frontier.effective_samples) // 2]
        table.append([f"{kls[i]:.2f}", f"{rewards[i]:.3f}", f"{frontier.prices[i]:.3g}", f"{median:.0f}"])
    return table


if __name__ == "__main__":
    main()
