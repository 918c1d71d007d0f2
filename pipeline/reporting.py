"""What rank zero tells of a run: the output directory, the console, metrics.jsonl, wandb, report.html."""

import time
from collections.abc import Mapping
from pathlib import Path

from pipeline.config import Config
from pipeline.evaluation import PLANE_FILE, Evaluation, figures_table, samples_table, write_evaluation
from pipeline.metrics import StepReport
from pipeline.reports.page import REPORT_FILE, write_run_page
from pipeline.run_directory import CONFIG_FILE, METRICS_FILE
from pipeline.runtime.console import Console
from pipeline.runtime.environment import begin_part, end_part
from pipeline.runtime.tracking import MetricsFile, WandbTracker


def show_evaluation(console: Console, evaluation: Evaluation, directory: Path) -> None:
    """Write the comparison into `directory` and print its figures and some samples."""
    write_evaluation(evaluation, directory)
    console.table("Samples before and after", samples_table(evaluation, 6))
    console.table("Before and after", figures_table(evaluation))
    console.say(f"Written to {directory}: evaluation.json, evaluation.md and {PLANE_FILE}")


def write_report(console: Console, directory: Path) -> None:
    """Write the run's report.html; a fault in that is a warning, for the run has all it needs."""
    try:
        write_run_page(directory)
    except Exception as error:
        console.say(f"warning: no {REPORT_FILE} ({type(error).__name__}: {error})")
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
        self.console = Console(config.ppo.steps, enabled=enabled)
        self._first_step: int | None = None
        self._started = time.monotonic()
        self._metrics: MetricsFile | None = None
        self._wandb: WandbTracker | None = None

    def __enter__(self) -> "Reporter":
        if self.enabled:
            config = self.config
            config.save(self.directory / CONFIG_FILE)
            metrics = self.directory / METRICS_FILE
            done = len(metrics.read_text(encoding="utf-8").splitlines()) if self._resumed else None
            begin_part(self.directory, after_step=done)
            self._metrics = MetricsFile(metrics, append=bool(self._resumed))
            if config.run.report_to == "wandb":
                self._wandb = WandbTracker(
                    project=config.run.wandb_project,
                    name=self.directory.name,
                    config=config.as_dict(),
                    directory=self.directory,
                    state=self._resumed.get("wandb"),
                )
            self._started = time.monotonic()
        self.console.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self.console.__exit__(*exception)
        if self._metrics is not None:
            self._metrics.close()
        if self._wandb is not None:
            self._wandb.finish()

    def state(self) -> dict[str, object]:
        """What a resumed run's reporter needs to go on."""
        return {"resumable": True, "wandb": None if self._wandb is None else self._wandb.state()}

    def step(self, report: StepReport) -> None:
        """Write and show one step's figures; samples every `samples_every_steps`."""
        if not self.enabled:
            return
        metrics, step, steps = report.metrics, report.step, self.config.ppo.steps
        self._metrics.write(metrics)
        self._first_step = step - 1 if self._first_step is None else self._first_step
        left = (time.monotonic() - self._started) / (step - self._first_step) * (steps - step)
        shown = {
            "reward": f"{metrics['reward/mean']:+.3f}",
            "KL": f"{metrics['kl/sequence_k1']:.2f}",
            "entropy": f"{metrics['ppo/entropy']:.2f}",
            "samples/s": f"{metrics['throughput/samples_per_second']:.1f}",
        }
        self.console.step(step, shown, left)
        if self._wandb is not None:
            self._wandb.log(step, metrics, report.scores)
        if step % self.config.run.samples_every_steps == 0 or step == steps:
            rows = [(sample.prompt, sample.response, sample.score) for sample in report.samples]
            self.console.samples(rows)
            if self._wandb is not None:
                self._wandb.log_samples(step, rows)

    def evaluation(self, evaluation: Evaluation) -> None:
        """Write and show the comparison before/after."""
        if not self.enabled:
            return
        show_evaluation(self.console, evaluation, self.directory)
        if self._wandb is not None:
            self._wandb.log_evaluation(evaluation.figures, samples_table(evaluation, 20))

    def end(self, outcome: str) -> None:
        """Note how the run ended, in a sentence, and write its report."""
        if self.enabled:
            end_part(self.directory, outcome)
            write_report(self.console, self.directory)
