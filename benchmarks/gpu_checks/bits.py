"""The same bits: twice the same run, with and without checkpoints, and resumed in another process."""

from pathlib import Path

from benchmarks.gpu_checks.context import Context
from benchmarks.gpu_checks.runs import Run, launch, settings_of_a_small_run, train_here
from benchmarks.kill_and_resume import differences

STEPS = 4


def _precisions(context: Context) -> tuple[str, ...]:
    return context.sized(("no", "bf16"), ("bf16",))


def _settings(context: Context, precision: str, **changed: object) -> dict[str, object]:
    lora = context.sized(False, True)  # small checkpoints
    return {"steps": STEPS, "mixed_precision": precision, "keep_last": STEPS + 1, "use_peft": lora, **changed}


def _whole(context: Context, precision: str, *, every: int) -> Run:
    """The run of four steps with a checkpoint every so many, trained once in a process."""
    name = f"{precision}_every_{every}"
    if (context.folder / name / "finished").exists():
        return Run(context.folder / name, [], "")
    return train_here(context, name, **_settings(context, precision, save_every_steps=every))


def _require_same(context: Context, expected: Path, found: Path, precision: str) -> None:
    different = differences(expected, found)
    context.measure(**{f"different, {precision}": len(different), f"first of them, {precision}": different[:5]})
    context.require(f"{precision}: weights and metrics are the same, every bit", not different)


def same_run_twice(context: Context) -> None:
    for precision in _precisions(context):
        again = train_here(context, f"{precision}_again", **_settings(context, precision))
        _require_same(context, _whole(context, precision, every=0).directory, again.directory, precision)


def checkpoints_change_nothing(context: Context) -> None:
    for precision in _precisions(context):
        runs = [_whole(context, precision, every=every).directory for every in (0, 1)]
        _require_same(context, *runs, precision)


def resumed(context: Context) -> None:
    """Two steps, then two more in a process of its own."""
    for precision in _precisions(context):
        whole = _whole(context, precision, every=1).directory
        directory = context.folder / f"{precision}_resumed"
        settings = _settings(context, precision, output_dir=directory, resume=whole / "checkpoints" / "step_000002")
        script = ["-m", "pipeline.train", *settings_of_a_small_run(context, **settings)]
        code, output = launch("single_gpu", 1, script, seconds=context.sized(45, 150))
        context.require(f"{precision}: the resumed run ends well", code == 0)
        context.require(f"{precision}: it goes on after step 2", "after step 2" in output)
        if code:
            context.measure(**{f"output, {precision}": output[-1500:]})
        else:
            _require_same(context, whole, directory, precision)
