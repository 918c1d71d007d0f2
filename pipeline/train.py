"""Train a language model with PPO: the main job.

    ./launch.sh                                                   # recipes/quickstart.yaml, set-up included
    ./launch.sh recipes/gpt2_imdb.yaml --learning_rate 1e-5       # any recipe, any setting over it
    accelerate launch --config_file accelerate_configs/multi_gpu.yaml -m pipeline.train --config recipes/gpt2_imdb.yaml

Writes into output_dir: config.yaml, metrics.jsonl, checkpoints, the tuned model with tokenizer and value head,
evaluation.json, .md and _samples.jsonl, plane.png, environment.json, report.html. A run that was cut off goes on from
its newest checkpoint, see --resume.

Exit codes: 0 finished; 1 a worker failed, with its traceback; 2 a setting, file or reward is at fault and nothing was
trained; 3 the reward failed in mid-run; 4 a guard ended the run (pipeline/guards.py); 130, 138, 143 stopped by SIGINT
(Ctrl-C), SIGUSR1 or SIGTERM. In 3, 4 and those a checkpoint and the model are saved: in 4 of the last good state.
"""

import signal

from accelerate import Accelerator

from pipeline.assembly import (
    Data,
    Parts,
    build_parts,
    choose_rollout_microbatch,
    config_warnings,
    open_data,
    parse_config,
)
from pipeline.config import Config, require_divides_by_workers
from pipeline.errors import (
    GUARD_STOPPED,
    REWARD_FAILED,
    STOPPED_BY_SIGNAL,
    UserError,
    end_worker,
    leave,
    user_errors,
    worker_faults,
)
from pipeline.evaluation import evaluate
from pipeline.guards import GuardError
from pipeline.models.saving import save_policy
from pipeline.reporting import Reporter
from pipeline.run_directory import (
    CHECKPOINTS,
    CONFIG_FILE,
    FINISHED,
    METRICS_FILE,
    Start,
    check_disk,
    check_shared,
    claim_output_dir,
    lock_output_dir,
    plan_start,
    settings_of,
)
from pipeline.runtime.checkpoints import Checkpoints, check_topology, newest_whole
from pipeline.runtime.distributed import all_or_none, make_accelerator, on_main
from pipeline.runtime.engine import (
    check_can_compile,
    check_can_shard_reference,
    full_state_dict,
    gathered,
    precision,
    strategy,
    trained_numbers,
)
from pipeline.runtime.signals import StopRequest
from pipeline.trainer import PPOTrainer


def main() -> None:
    with worker_faults(), StopRequest() as stop:
        code, failure = start_and_run(stop)
    if code:
        leave(code, failure)
    end_worker()


def start_and_run(stop: StopRequest) -> tuple[int, UserError | None]:
    """Everything between the command line and the exit code, and the error of a run that failed on its way."""
    with user_errors():
        config = parse_config(__doc__)
        accelerator = make_accelerator(config.run.mixed_precision)
        config.run.mixed_precision = precision(accelerator)
        _lock = all_or_none(
            accelerator, lambda: lock_output_dir(config.output_dir) if accelerator.is_main_process else None
        )
        start = on_main(accelerator, lambda: plan_start(config, print))
        data, parts = all_or_none(accelerator, lambda: prepare(config, accelerator, start))
        choose_rollout_microbatch(config, accelerator, parts.policy, config.rollout.rollout_batch_size)
        say = (lambda _text: None) if config.run.quiet else print
        on_main(accelerator, lambda: claim_output_dir(config.output_dir, start, say))
        all_or_none(accelerator, lambda: check_shared(config.output_dir))
        if config.model.shard_reference:
            parts.reference.shard(accelerator)
        trainer = PPOTrainer(
            accelerator, parts.policy, parts.reference, parts.reward, data.tokenizer, data.training, config, stop
        )
        checkpoints = Checkpoints(accelerator, config.output_dir / CHECKPOINTS, keep_last=config.run.keep_last)
        saved = None if start.checkpoint is None else checkpoints.load(start.checkpoint)
    if saved is not None:
        trainer.restore(saved["trainer"])
    resumed = None if saved is None else saved["reporter"]
    with Reporter(config, enabled=accelerator.is_main_process, resumed=resumed) as reporter:
        reporter.console.say(describe(config, data, parts, accelerator))
        if saved is not None:
            reporter.console.say(f"Going on from {start.checkpoint}, after step {trainer.finished}.")
        for warning in config_warnings(config):
            reporter.console.warn(warning)
        trainer.phases.watcher = reporter.console.phase
        failure = run(trainer, checkpoints, reporter, config, data, parts)
        reporter.end(outcome(trainer, failure))
    accelerator.wait_for_everyone()
    if failure is not None:
        return GUARD_STOPPED if isinstance(failure, GuardError) else REWARD_FAILED, failure
    return STOPPED_BY_SIGNAL + trainer.stopped_by if trainer.stopped_by else 0, None


def prepare(config: Config, accelerator: Accelerator, start: Start) -> tuple[Data, Parts]:
    """Check everything, then load it; raises `UserError`."""
    require_divides_by_workers(config, accelerator.num_processes)
    if start.checkpoint is not None:
        check_topology(start.checkpoint, strategy(accelerator), accelerator.num_processes)
        if config.rollout.rollout_microbatch_size is None:  # another one would round otherwise
            config.rollout.rollout_microbatch_size = settings_of(start.checkpoint).get("rollout_microbatch_size")
    if config.model.shard_reference:
        check_can_shard_reference(accelerator)
    if config.ppo.torch_compile:
        check_can_compile(accelerator)
    data = open_data(config)
    parts = build_parts(config, data, accelerator.device)
    trainable = trained_numbers(parts.policy)
    if config.run.save_every_steps:
        all_written = strategy(accelerator) == "fsdp2"
        frozen = sum(p.numel() for p in parts.policy.parameters() if all_written and not p.requires_grad)
        check_disk(config.output_dir, trainable, config.run.keep_last, frozen=frozen)
    return data, parts


def run(
    trainer: PPOTrainer, checkpoints: Checkpoints, reporter: Reporter, config: Config, data: Data, parts: Parts
) -> UserError | None:
    """Train, save, evaluate. What was learned is saved also where the training fails; its error is returned then."""
    accelerator, console = trainer.accelerator, reporter.console
    kept = trainer.finished or None

    def keep(*, now: bool = False) -> None:
        nonlocal kept
        every, done = config.run.save_every_steps, trainer.finished
        due = bool(every) and (done % every == 0 or done == config.ppo.steps)
        if done == kept or not (due or now):
            return
        kept = done
        console.phase("checkpoint")
        state = {"trainer": trainer.state(), "reporter": reporter.state()}
        files = {name: config.output_dir / name for name in (CONFIG_FILE, METRICS_FILE)}
        try:
            checkpoints.save(done, state, files)
        except UserError as error:  # a full disk must not end a run that could go on
            console.warn(str(error))

    if config.run.save_every_steps and not trainer.finished:
        keep(now=True)  # so that there is a good state to go back to from the first step on
    failure = None
    try:
        trainer.train(reporter.step, keep, console.warn)
    except UserError as error:
        failure = error
    if isinstance(failure, GuardError):
        console.say(go_back(trainer, checkpoints), always=True)
    elif failure is not None or trainer.stop_requested():
        good = trainer.guards.content or not config.run.save_every_steps  # else one from before the bad steps is there
        if good:
            keep(now=True)
    weights = full_state_dict(accelerator, trainer.engine)
    if accelerator.is_main_process:
        save_policy(
            parts.policy, data.tokenizer, config.output_dir, config.rollout, step=trainer.finished, weights=weights
        )
    del weights
    console.say(f"The model is saved in {config.output_dir}")
    if failure is not None:
        return failure
    if trainer.stopped_by:
        console.say(f"Stopped by {signal.Signals(trainer.stopped_by).name} after {trainer.finished} of "
                    f"{config.ppo.steps} steps. The same command goes on from there.", always=True)  # fmt: skip
        return None
    if config.run.evaluation_prompts:
        console.phase("evaluation")
        try:
            with gathered(trainer.engine):
                evaluation = evaluate(
                    accelerator, parts.policy, parts.reference, parts.reward, data.tokenizer, data.held_out, config,
                    parts.frontier,
                )  # fmt: skip
            reporter.evaluation(evaluation)
        except UserError as error:
            return error
    reporter.finished()
    if accelerator.is_main_process:
        (config.output_dir / FINISHED).touch()
    return None


def go_back(trainer: PPOTrainer, checkpoints: Checkpoints) -> str:
    """Give the policy back its newest checkpoint, which is of before the first bad step; returns what was done."""
    last_good = on_main(trainer.accelerator, lambda: newest_whole(checkpoints.directory, print))
    if last_good is None:
        return "There is no checkpoint to go back to: the model saved is the spoilt one."
    trainer.restore(checkpoints.load(last_good)["trainer"])
    return f"Back to the last good state, after step {trainer.finished}: {last_good}"


def outcome(trainer: PPOTrainer, failure: UserError | None) -> str:
    """How the run ended."""
    steps = f"{trainer.finished} of {trainer.config.ppo.steps} steps"
    if failure is not None:
        return f"ended after {steps}: {failure}"
    if trainer.stopped_by:
        return f"stopped by {signal.Signals(trainer.stopped_by).name} after {steps}"
    return "finished"


def describe(config: Config, data: Data, parts: Parts, accelerator: Accelerator) -> str:
    """What this run is and how the work is shared."""
    trainable = trained_numbers(parts.policy)
    workers, ppo = accelerator.num_processes, config.ppo
    return (
        f"{config.model.model_path}: {trainable / 1e6:.2f} M trainable parameters"
        f"{' (LoRA, sharing the reference)' if parts.reference.is_shared else ' and a frozen reference'}; "
        f"{len(data.training)} training and {len(data.held_out)} held-out openings.\n"
        f"{workers} worker{'s' if workers > 1 else ''} on {accelerator.device.type} ({strategy(accelerator)}), "
        f"precision {precision(accelerator)}: {config.rollout.rollout_batch_size // workers} rollouts "
        f"({config.rollout.rollout_microbatch_size} at a time) and "
        f"{ppo.minibatch_size // workers} of each minibatch's {ppo.minibatch_size} samples a worker; "
        f"{ppo.steps} steps of {ppo.ppo_epochs} epochs; writing to {config.output_dir}"
    )


if __name__ == "__main__":
    main()
