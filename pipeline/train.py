"""Train a language model with PPO: the main job.

    ./launch.sh                                                   # recipes/quickstart.yaml, set-up included
    ./launch.sh recipes/gpt2_imdb.yaml --learning_rate 1e-5       # any recipe, any setting over it
    accelerate launch --config_file accelerate_configs/multi_gpu.yaml -m pipeline.train --config recipes/gpt2_imdb.yaml

Writes into output_dir: config.yaml, metrics.jsonl, the tuned model with tokenizer and value head, evaluation.json and
evaluation.md. Exit codes: 0 finished; 2 a setting, file or reward is at fault and nothing was trained; 3 the reward
failed in mid-run, what was learned is saved; 130, 138, 143 stopped by SIGINT (Ctrl-C), SIGUSR1 or SIGTERM, saved too.
"""

import signal

from accelerate import Accelerator

from pipeline.assembly import Data, Parts, build_parts, open_data, parse_config, sampling_warning
from pipeline.config import Config, require_divides_by_workers
from pipeline.errors import REWARD_FAILED, STOPPED_BY_SIGNAL, UserError, leave, user_errors
from pipeline.evaluation import evaluate
from pipeline.models.saving import save_policy
from pipeline.reporting import Reporter, check_output_dir, claim_output_dir
from pipeline.runtime.distributed import all_or_none, make_accelerator
from pipeline.runtime.engine import gathered, precision, strategy
from pipeline.runtime.signals import StopRequest
from pipeline.trainer import PPOTrainer


def main() -> None:
    with StopRequest() as stop:
        code, failure = start_and_run(stop)
    if code:
        leave(code, failure)


def start_and_run(stop: StopRequest) -> tuple[int, UserError | None]:
    """Everything between the command line and the exit code, and the error of a reward that failed in mid-run."""
    with user_errors():
        config = parse_config(__doc__)
        accelerator = make_accelerator(config.run.mixed_precision)
        config.run.mixed_precision = precision(accelerator)
        data, parts = all_or_none(accelerator, lambda: prepare(config, accelerator))
        all_or_none(accelerator, lambda: claim_output_dir(config.output_dir) if accelerator.is_main_process else None)
    trainer = PPOTrainer(
        accelerator, parts.policy, parts.reference, parts.reward, data.tokenizer, data.training, config, stop
    )
    with Reporter(config, enabled=accelerator.is_main_process) as reporter:
        reporter.console.say(describe(config, data, parts, accelerator))
        if warning := sampling_warning(config):
            reporter.console.say(f"warning: {warning}")
        failure = run(trainer, reporter, config, data, parts)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if failure is not None:
        return REWARD_FAILED, failure
    return STOPPED_BY_SIGNAL + trainer.stopped_by if trainer.stopped_by else 0, None


def prepare(config: Config, accelerator: Accelerator) -> tuple[Data, Parts]:
    """Check everything, then load it; raises `UserError`."""
    require_divides_by_workers(config, accelerator.num_processes)
    check_output_dir(config.output_dir)
    data = open_data(config)
    return data, build_parts(config, data, accelerator.device)


def run(trainer: PPOTrainer, reporter: Reporter, config: Config, data: Data, parts: Parts) -> UserError | None:
    """Train, save, evaluate. What was learned is saved also where the reward fails; its error is returned then."""
    accelerator, say = trainer.accelerator, reporter.console.say
    failure, finished = None, 0
    try:
        finished = trainer.train(reporter.step)
    except UserError as error:
        failure = error
    with gathered(trainer.engine):
        if accelerator.is_main_process:
            save_policy(
                parts.policy,
                data.tokenizer,
                config.output_dir,
                max_new_tokens=config.rollout.response_max_tokens,
                temperature=config.rollout.temperature,
            )
    say(f"The model is saved in {config.output_dir}")
    if failure is not None:
        return failure
    if trainer.stopped_by:
        say(f"Stopped by {signal.Signals(trainer.stopped_by).name} after {finished} of {config.ppo.steps} steps. "
            f"`python -m pipeline.evaluate {config.output_dir}` compares it with the original.")  # fmt: skip
    elif config.run.evaluation_prompts:
        try:
            with gathered(trainer.engine):
                evaluation = evaluate(
                    accelerator, parts.policy, parts.reference, parts.reward, data.tokenizer, data.held_out, config
                )
            reporter.evaluation(evaluation)
        except UserError as error:
            return error
    return None


def describe(config: Config, data: Data, parts: Parts, accelerator: Accelerator) -> str:
    """What this run is and how the work is shared."""
    trainable = sum(p.numel() for p in parts.policy.parameters() if p.requires_grad)
    workers, ppo = accelerator.num_processes, config.ppo
    return (
        f"{config.model.model_path}: {trainable / 1e6:.2f} M trainable parameters"
        f"{' (LoRA, sharing the reference)' if parts.reference.is_shared else ' and a frozen reference'}; "
        f"{len(data.training)} training and {len(data.held_out)} held-out openings.\n"
        f"{workers} worker{'s' if workers > 1 else ''} on {accelerator.device.type} ({strategy(accelerator)}), "
        f"precision {precision(accelerator)}: {config.rollout.rollout_batch_size // workers} rollouts and "
        f"{ppo.minibatch_size // workers} of each minibatch's {ppo.minibatch_size} samples a worker; "
        f"{ppo.steps} steps of {ppo.ppo_epochs} epochs; writing to {config.output_dir}"
    )


if __name__ == "__main__":
    main()
