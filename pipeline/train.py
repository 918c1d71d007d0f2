"""Train a language model with PPO: the main job.

    ./launch.sh                                                   # recipes/quickstart.yaml, set-up included
    ./launch.sh recipes/gpt2_imdb.yaml --learning_rate 1e-5       # any recipe, any setting over it
    accelerate launch --config_file accelerate_configs/multi_gpu.yaml -m pipeline.train --config recipes/gpt2_imdb.yaml

Writes into output_dir: config.yaml, metrics.jsonl, checkpoints, the tuned model with tokenizer and value head,
evaluation.json, .md and _samples.jsonl, plane.png, environment.json, report.html. A run that was cut off goes on from
its newest checkpoint, see --resume.

Exit codes: 0 finished; 1 a worker failed, with its traceback; 2 a setting, file, disk or reward is at fault and nothing
was trained; 3 the reward failed in mid-run; 4 a guard ended the run (pipeline/guards.py); 5 the model, the evaluation
or the report could not be written: the same command makes them from the newest checkpoint; 130, 138, 143 stopped by
SIGINT (Ctrl-C), SIGUSR1 or SIGTERM, in training or evaluation. In 3, 4 and those a checkpoint and the model are saved:
in 4 of the last good state.
"""

from contextlib import ExitStack

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
from pipeline.config import SECTIONS, Config, require_divides_by_workers
from pipeline.ending import end, exit_code, go_back, stopped_line
from pipeline.errors import (
    OtherWorkerError,
    Stopped,
    UserError,
    WriteError,
    end_worker,
    leave,
    user_errors,
    worker_faults,
    writing,
)
from pipeline.evaluation import evaluate
from pipeline.guards import GuardError
from pipeline.inputs import check_same_inputs, inputs_of
from pipeline.models.saving import forget_policy, save_policy
from pipeline.reporting import Reporter
from pipeline.run_directory import (
    CHECKPOINTS,
    CONFIG_FILE,
    METRICS_FILE,
    Start,
    check_disk,
    check_shared,
    claim_output_dir,
    lock_output_dir,
    plan_start,
    settings_of,
)
from pipeline.runtime.checkpoints import CheckpointError, Checkpoints, check_topology
from pipeline.runtime.distributed import all_or_none, make_accelerator, on_main
from pipeline.runtime.engine import (
    check_can_compile,
    check_can_shard_reference,
    full_state_dict,
    gathered,
    precision,
    strategy,
)
from pipeline.runtime.signals import StopRequest
from pipeline.runtime.weights import trained_numbers
from pipeline.trainer import PPOTrainer

SETTINGS = SECTIONS


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
    reporter = Reporter(config, enabled=accelerator.is_main_process, resumed=resumed)
    with ExitStack() as opened:
        with user_errors():
            all_or_none(accelerator, lambda: opened.enter_context(reporter))
        reporter.console.say("\n".join([*data.training.notes, describe(config, data, parts, accelerator)]))
        if saved is not None:
            reporter.console.say(f"Going on from {start.checkpoint}, after step {trainer.finished}.")
        for warning in config_warnings(config):
            reporter.console.warn(warning)
        trainer.phases.watcher = reporter.console.phase
        failure = run(trainer, checkpoints, reporter, config, data, parts)
        failure = end(trainer, reporter, config, failure)
    accelerator.wait_for_everyone()
    return exit_code(trainer, failure), failure


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
    if start.checkpoint is not None and accelerator.is_main_process:
        check_same_inputs(start.checkpoint, config, data.training, data.held_out)
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
    kept = trainer.finished or None  # the step of the newest checkpoint
    inputs = inputs_of(config, data.training, data.held_out) if accelerator.is_main_process else None

    def keep(*, now: bool = False, required: bool = False) -> None:
        nonlocal kept
        every, done = config.run.save_every_steps, trainer.finished
        due = bool(every) and (done % every == 0 or done == config.ppo.steps)
        if done == kept or not (due or now):
            return
        console.phase("checkpoint")
        state = {"trainer": trainer.state(), "reporter": reporter.state(), "inputs": inputs}
        files = {name: config.output_dir / name for name in (CONFIG_FILE, METRICS_FILE)}
        try:
            on_main(accelerator, reporter.flush)
            checkpoints.save(done, state, files)
        except UserError as error:  # a full disk must not end a run that could go on
            if required:
                raise
            console.warn(str(error))
        else:
            kept = done

    def keep_good() -> None:
        if trainer.guards.content or not config.run.save_every_steps:  # else one from before the bad steps is there
            keep(now=True)

    if config.run.save_every_steps and not trainer.finished:
        try:
            keep(now=True, required=True)  # so that there is a good state to go back to from the first step on
        except OtherWorkerError as error:
            return error
        except UserError as error:
            return CheckpointError(
                f"{error}. Nothing was trained: make room there, choose another output_dir, or set save_every_steps to "
                f"0 for a run without checkpoints."
            )
    failure = None
    try:
        trainer.train(reporter.step, keep, console.warn)
    except UserError as error:
        failure = error
    if isinstance(failure, GuardError):
        console.say(go_back(trainer, checkpoints), always=True)
    elif failure is not None or trainer.stop_requested():
        keep_good()
    refused = save_model(trainer, config, data, parts)
    if refused is None:
        console.say(f"The model is saved in {config.output_dir}")
    elif failure is not None or trainer.stopped_by:
        console.warn(str(refused))
    else:
        return refused
    if failure is not None:
        return failure
    if trainer.stopped_by:
        console.say(stopped_line(trainer, kept), always=True)
        return None
    if config.run.evaluation_prompts:
        console.phase("evaluation")
        try:
            with gathered(trainer.engine):
                evaluation = evaluate(
                    accelerator, parts.policy, parts.reference, parts.reward, data.tokenizer, data.held_out, config,
                    parts.frontier, lambda: trainer.stop.check(accelerator),
                )  # fmt: skip
            on_main(accelerator, lambda: reporter.evaluation(evaluation))
        except Stopped as stopped:
            trainer.stopped_by = stopped.number
        except UserError as error:
            failure = error
        if failure is not None or trainer.stopped_by:
            keep_good()  # where none was asked for: what was trained is not trained again
        if trainer.stopped_by:
            console.say(stopped_line(trainer, kept, what="evaluation"), always=True)
    return failure


def save_model(trainer: PPOTrainer, config: Config, data: Data, parts: Parts) -> UserError | None:
    """Write the model, collectively; the error of a disk that refuses it, which then has no half of one either."""
    accelerator, directory = trainer.accelerator, config.output_dir
    weights = full_state_dict(accelerator, trainer.engine)

    def save() -> None:
        try:
            with writing(f"the model in {directory}"):
                save_policy(
                    parts.policy, data.tokenizer, directory, config.rollout, step=trainer.finished, weights=weights
                )
        except WriteError:
            forget_policy(directory)
            raise

    try:
        on_main(accelerator, save)
    except UserError as error:
        return error
    return None


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
