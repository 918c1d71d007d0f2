"""What rank zero tells of a run: the output directory, the console, metrics.jsonl, the trackers, report.html."""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path

from pipeline.config import Config, ConfigError
from pipeline.errors import WriteError, writing
from pipeline.evaluation import Evaluation, figures_table, samples_table, write_evaluation
from pipeline.foreign_text import without_secrets
from pipeline.metrics import Sample, StepReport
from pipeline.reports.page import write_run_page
from pipeline.run_directory import CONFIG_FILE, EVALUATION_FILE, EVALUATION_TEXT, METRICS_FILE, PLANE_FILE, REPORT_FILE
from pipeline.runtime.console import Console
from pipeline.runtime.environment import ENVIRONMENT_FILE, begin_part, end_part
from pipeline.runtime.tracking import MetricsFile, Trackers

# What the console shows of a step: its name there, the metric, how it is written.
SHOWN = {
    "reward": ("reward/mean", "+.3f"),
    "KL": ("kl/sequence_k1", ".2f"),
    "entropy": ("ppo/entropy", ".2f"),
    "samples/s": ("throughput/samples_per_second", ".1f"),
}
TRACKED_EVALUATION_ROWS = 100
FLOAT32_DEVIATION = 1e-3  # of the first ratio from 1: products of float32 leave hundreds of times less


def show_evaluation(console: Console, evaluation: Evaluation, directory: Path) -> None:
    """Write the comparison into `directory` and print its figures and some samples.

    They are printed also where the disk refuses them, before the `WriteError` of that.
    """
    refused = None
    try:
        with writing(directory / EVALUATION_FILE):
            write_evaluation(evaluation, directory)
    except WriteError as error:
        refused = error
    console.table("Samples before and after", samples_table(evaluation, 6))
    console.table("Before and after", figures_table(evaluation))
    if refused is not None:
        raise refused
    console.say(f"Written to {directory}: {EVALUATION_FILE}, {EVALUATION_TEXT} and {PLANE_FILE}")
    if console.quiet:
        console.say(f"{_outcome(evaluation)}: {directory}", always=True)


def write_report(console: Console, directory: Path) -> None:
    """Write the run's report.html; a fault in making it is a warning, for the run has all it needs.

    Raises:
        WriteError: the disk refused it.
    """
    try:
        with writing(directory / REPORT_FILE):
            write_run_page(directory)
    except WriteError:
        raise
    except Exception as error:
        console.warn(f"no {REPORT_FILE} ({type(error).__name__}: {error})")
    else:
        console.say(f"The report is {directory / REPORT_FILE}")


class Reporter:
    """Reports a run; with `enabled=False` (every rank but zero) it does nothing."""

    def __init__(self, config: Config, *, enabled: bool, resumed: Mapping[str, object] | None = None):
        """
        Args:
            resumed: what `state` gave when the checkpoint was written, for a run that goes on.
        """
        self._resumed = resumed or {}
        self.config = config
        self.enabled = enabled
        self.directory = config.output_dir
        self.console = Console(config.ppo.steps, enabled=enabled, quiet=config.run.quiet)
        self._first: Mapping[str, float] | None = None  # metrics of the run's first step
        self._first_step: int | None = None  # of this part of the run
        self._started = time.monotonic()
        self._told_of_rounding = False
        self._metrics: MetricsFile | None = None
        self._trackers: Trackers | None = None

    def __enter__(self) -> "Reporter":
        """Open the run's files; raises `ConfigError` where they cannot be written."""
        try:
            self._open()
        except OSError as error:
            raise ConfigError(f"output_dir={str(self.directory)!r} cannot be written: {error}") from error
        self.console.__enter__()
        return self

    def _open(self) -> None:
        if self.enabled:
            config = self.config
            config.save(self.directory / CONFIG_FILE)
            metrics, done = self.directory / METRICS_FILE, None
            if self._resumed:
                done = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
                for step in done:
                    self._remember({n: math.nan if v is None else v for n, v in step.items()})
            begin_part(self.directory, after_step=None if done is None else len(done))
            self._metrics = MetricsFile(metrics, append=bool(self._resumed))
            self._trackers = Trackers(
                config.run.trackers,
                project=config.run.wandb_project,
                name=self.directory.name,
                config=without_secrets(config.as_dict()),
                directory=self.directory,
                say=self.console.say,
                warn=self.console.warn,
                state=self._resumed.get("trackers"),
            )
            self._started = time.monotonic()

    def __exit__(self, *exception: object) -> None:
        self.console.__exit__(*exception)
        if self.enabled:
            self._metrics.close()
            self._trackers.finish(failed=exception[0] is not None)

    def state(self) -> dict[str, object]:
        """What a resumed run's reporter needs to go on."""
        return {"resumable": True, "trackers": self._trackers.state() if self.enabled else None}

    def flush(self) -> None:
        """Write the steps that found no room yet; raises `WriteError`."""
        if self.enabled:
            with writing(self.directory / METRICS_FILE):
                self._metrics.flush()

    def step(self, report: StepReport) -> None:
        """Write and show one step's figures; samples every `samples_every_steps`."""
        if not self.enabled:
            return
        metrics, step, steps = report.metrics, report.step, self.config.ppo.steps
        try:
            self._metrics.write(metrics)
        except OSError as error:
            if len(self._metrics.waiting) == 1:  # else it was told of an earlier step
                self.console.warn(
                    f"{self.directory / METRICS_FILE} could not be written ({error}); steps wait in memory."
                )
        self._remember(metrics)
        self._first_step = step - 1 if self._first_step is None else self._first_step
        left = (time.monotonic() - self._started) / (step - self._first_step) * (steps - step)
        notes = self._notes()
        shown = {name: (f"{metrics[metric]:{form}}", notes.get(name, "")) for name, (metric, form) in SHOWN.items()}
        self.console.step(step, shown, left)
        self._check_rounding(step, metrics)
        parts = report.parts if len(report.parts) > 1 else {}  # one alone is the reward
        histograms = {f"reward/{name}/histogram": values for name, values in parts.items()}
        self._trackers.log(step, metrics, {"reward/histogram": report.scores, **histograms})
        if step % self.config.run.samples_every_steps == 0 or step == steps:
            self.console.samples([(sample.prompt, sample.response, _given(sample)) for sample in report.samples])
            columns = ["prompt", "response", "reward", *(f"reward/{name}" for name in report.parts), "KL"]
            self._trackers.samples(
                columns, [[s.prompt, s.response, s.score, *s.parts.values(), s.kl] for s in report.samples]
            )

    def evaluation(self, evaluation: Evaluation) -> None:
        """Write and show the comparison before/after; raises `WriteError`."""
        if not self.enabled:
            return
        show_evaluation(self.console, evaluation, self.directory)
        curves = ("way", "frontier_curve")  # for reports; the steps of the way are logged
        figures = {name: value for name, value in evaluation.figures.items() if name not in curves}
        self._trackers.summary("evaluation", figures)
        header, *rows = figures_table(evaluation)
        self._trackers.table("evaluation/figures", header, rows)
        rows = evaluation.rows[:TRACKED_EVALUATION_ROWS]
        measures = [(side, name) for side in ("before", "after") for name in rows[0][f"{side}_measures"]]
        columns = ["prompt", "before", "after", *(f"{name} {side}" for side, name in measures), "KL after"]
        cells = [
            [
                *(row[name] for name in ("prompt", "before", "after")),
                *(row[f"{side}_measures"][name] for side, name in measures),
                row["after_kl"],
            ]
            for row in rows
        ]
        self._trackers.table("before and after", columns, cells)

    def end(self, outcome: str) -> None:
        """Note how the run ended, in a sentence, and write its report; raises `WriteError`."""
        if self.enabled:
            self.flush()
            with writing(self.directory / ENVIRONMENT_FILE):
                end_part(self.directory, outcome)
            write_report(self.console, self.directory)

    def finished(self) -> None:
        """The run is over and the model is saved."""
        if self.enabled and self.config.run.wandb_log_model:
            self._trackers.model(sorted(path for path in self.directory.iterdir() if path.is_file()))

    def _check_rounding(self, step: int, metrics: Mapping[str, float]) -> None:
        """Warn, once, where what is called float32 is none."""
        deviation = metrics.get("ppo/first_minibatch_ratio_deviation", 0.0)
        if self.config.run.mixed_precision != "no" or deviation <= FLOAT32_DEVIATION or self._told_of_rounding:
            return
        self._told_of_rounding = True
        self.console.warn(
            f"step {step}: before any update the ratio of new to old probabilities is {deviation:.1g} off 1, more than "
            f"float32 rounds. The GPU may round products to TF32 (unset NVIDIA_TF32_OVERRIDE), or the model may say "
            f"other things token by token than over a whole text."
        )

    def _remember(self, metrics: Mapping[str, float]) -> None:
        """Keep a step's figures for the live picture."""
        self._first = self._first or metrics
        self.console.remember({name: metrics[metric] for name, (metric, _form) in SHOWN.items()})

    def _notes(self) -> dict[str, str]:
        """What a figure is to be held against."""
        ppo = self.config.ppo
        notes = {"reward": f"first {self._first['reward/mean']:+.3f}"}
        if ppo.kl_adaptive:
            notes["KL"] = f"target {ppo.kl_target:g}"
        elif ppo.guard_kl is not None:
            notes["KL"] = f"guard {ppo.guard_kl:g}"
        if ppo.guard_entropy is not None:
            notes["entropy"] = f"guard {ppo.guard_entropy * self._first['ppo/entropy']:.2f}"
        return notes


def _given(sample: Sample) -> str:
    """The reward of a sample, and its components where there are several."""
    parts = "".join(f"  {name} {value:+.2f}" for name, value in sample.parts.items()) if len(sample.parts) > 1 else ""
    return f"{sample.score:+.2f}{parts}"


def _outcome(evaluation: Evaluation) -> str:
    """The comparison in a line."""
    reward, kl = evaluation.figures["reward"], evaluation.figures["kl"]
    before, after = reward["before"]["mean"], reward["after"]["mean"]
    return f"{reward['name']} {before:.3f} before, {after:.3f} after, at a KL of {kl:.2f} nats"
