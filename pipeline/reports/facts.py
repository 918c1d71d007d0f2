"""What a report says in words and numbers: headline, tables of figures, time and cost, settings, hardware."""

import dataclasses
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from pipeline.config import SECTIONS
from pipeline.evaluation import Evaluation, figures_table
from pipeline.frontiers import overspend_cell
from pipeline.reports.outcome_charts import measure_label
from pipeline.reports.records import Group, Run, differing

UNKNOWN = "not recorded"
PHASES = {
    "sample": "sampling",
    "reference": "reference log-probs",
    "score": "reward",
    "forward": "policy log-probs and values",
    "update": "updates",
}


@dataclass(frozen=True)
class Tile:
    """A headline figure."""

    label: str
    value: str
    detail: str = ""


@dataclass(frozen=True)
class Setting:
    """A setting of the recipe."""

    name: str
    value: str
    help: str
    changed: bool  # from the default


def headline(run: Run) -> list[Tile]:
    """The figures one asks for first; what was not evaluated is left out."""
    tiles = []
    if run.figures:
        before, after = run.figures["before"], run.figures["after"]
        measure = shown_measure(run)
        then, now = before[measure], after[measure]
        detail = f"95 % interval {_range(now['ci95'])}, before {_range(then['ci95'])}"
        tiles = [
            Tile(measure_label(measure, run), f"{then['mean']:.3f} → {now['mean']:.3f}", detail),
            Tile("KL from the original", f"{run.figures['kl']:.2f} nats",
                 f"a response, 95 % interval {_range(run.figures['kl_ci95'], 2)}"),
            _overspend_tile(run.figures.get("frontier")),
            _change("distinct-2", before, after, "distinct_2", ".3f", "different pairs of words"),
            _change("perplexity", before, after, "perplexity", ".1f", "under the original"),
        ]  # fmt: skip
    elif run.steps:
        first, last = run.steps[0], run.steps[-1]
        tiles = [
            Tile("mean reward", f"{_number(first.get('reward/mean'))} → {_number(last.get('reward/mean'))}",
                 "first and last step of the training; not evaluated"),
            Tile("KL from the original", f"{_number(last.get('kl/sequence_k1'), 2)} nats", "a response, last step"),
        ]  # fmt: skip
    return [*tiles, Tile("training time", duration(run.seconds("step")), _ran_on(run))]


def shown_measure(run: Run) -> str:
    """The measure a reader knows best: the classifier's probability, or else the rewarded one."""
    names = [name for name, value in run.figures["before"].items() if isinstance(value, dict)]
    rewarded = run.figures.get("reward", {}).get("name", names[0])
    return "probability" if "probability" in names else rewarded


def _overspend_tile(frontier: Mapping[str, object] | None) -> Tile:
    if frontier is None:
        return Tile("KL overspend", "unknown", "the best possible for this recipe was not estimated")
    if "beyond" in frontier:
        return Tile("KL overspend", "beyond", str(frontier["beyond"]))
    spent, low, high = map(overspend_cell, (frontier["kl_overspend"], *frontier["kl_overspend_ci95"]))
    detail = f"{low} to {high}; 1 is perfect. {frontier['kl_needed']:.2f} nats would do for this reward"
    return Tile("KL overspend", f"{spent} ×", detail)


def _change(label: str, before: Mapping, after: Mapping, name: str, form: str, detail: str) -> Tile:
    of_before = f"; {after[name] / before[name]:.0%} of the original's" if before[name] else ""
    return Tile(label, f"{before[name]:{form}} → {after[name]:{form}}", detail + of_before)


def _ratio(run: Run, name: str) -> float | None:
    before, after = run.figures["before"][name], run.figures["after"][name]
    return after / before if before else None


def evaluation_table(run: Run) -> list[list[str]]:
    """All figures of the evaluation, the first row the header; empty where there is none."""
    return figures_table(Evaluation(run.figures, [])) if run.figures else []


# Of a finished run: the columns of a comparison, each with its digits.
COLUMNS: dict[str, tuple[Callable[[Run], float | None], int]] = {
    "KL, nats": (lambda run: run.figures["kl"], 2),
    "KL overspend": (lambda run: run.figures.get("frontier", {}).get("kl_overspend"), 2),
    "distinct-2 of before's": (lambda run: _ratio(run, "distinct_2"), 2),
    "perplexity": (lambda run: run.figures["after"]["perplexity"], 1),
}  # fmt: skip


def comparison_table(groups: Sequence[Group]) -> list[tuple[bool, list[str]]]:
    """Runs as rows of cells, the header first; after several seeds a row of their mean and spread, which is marked."""
    evaluated = [run for group in groups for run in group.runs if run.figures]
    labels = list(dict.fromkeys(measure_label(shown_measure(run), run) for run in evaluated))
    told = labels[0] if len(labels) == 1 else "evaluation"
    rows = [(False, ["run", "seed", f"{told} after", *COLUMNS, "training time", "outcome"])]
    for group in groups:
        for run in group.runs:
            cells = [""] * (len(COLUMNS) + 1)
            if run.figures:
                after = run.figures["after"][shown_measure(run)]
                which = "" if len(labels) == 1 else f"{measure_label(shown_measure(run), run)} "
                cells = [f"{which}{after['mean']:.3f} ({_range(after['ci95'])})"]
                cells += [_number(read(run), digits) for read, digits in COLUMNS.values()]
            time = duration(run.seconds("step"))
            rows.append((False, [run.name, str(run.config.get("seed")), *cells, time, run.outcome]))
        done = [run for run in group.runs if run.figures]
        if len(done) > 1:
            cells = [_spread([run.figures["after"][shown_measure(run)]["mean"] for run in done], 3)]
            cells += [_spread([read(run) for run in done], digits) for read, digits in COLUMNS.values()]
            time = duration(statistics.fmean(run.seconds("step") for run in done))
            rows.append((True, [f"{group.name}: mean ± standard deviation (range)", "", *cells, time, ""]))
    return rows


def _spread(values: Sequence[float | None], digits: int) -> str:
    known = [value for value in values if value is not None]
    if len(known) < 2:
        return ""
    low, high = min(known), max(known)
    mean, deviation = statistics.fmean(known), statistics.stdev(known)
    return f"{mean:.{digits}f} ± {deviation:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def time_table(run: Run) -> list[list[str]]:
    """Time of each phase, the first row the header; where known also the cost: time x workers, core- or GPU-hours."""
    whole = run.seconds("step")
    measured = {
        label: [step.get(f"time/{phase}_seconds") or 0.0 for step in run.steps] for phase, label in PHASES.items()
    }
    each_step = [step.get("time/step_seconds") or 0.0 for step in run.steps]
    rest = [max(0.0, total - sum(parts)) for total, *parts in zip(each_step, *measured.values(), strict=True)]
    units = [_units(run.part_of(step["step"])) for step in run.steps]
    known = bool(run.steps) and None not in units
    gpu = known and run.parts[-1]["device"] == "cuda"
    rows = [["phase", "time", "of the steps", *(["GPU-hours" if gpu else "core-hours"] if known else [])]]
    for label, seconds in {**measured, "gathering, advantages, figures": rest, "all steps": each_step}.items():
        cost = [f"{sum(s * u for s, u in zip(seconds, units, strict=True)) / 3600:.4f}"] if known else []
        share = f"{sum(seconds) / whole:.1%}" if whole else ""
        rows.append([label, duration(sum(seconds)), share, *cost])
    wall = wall_seconds(run)
    around = {
        "loading, checkpoints, evaluation": None if wall is None else max(0.0, wall - whole),
        "start to end": wall,
    }
    for label, seconds in around.items():
        rows.append([label, UNKNOWN if seconds is None else duration(seconds), *[""] * (len(rows[0]) - 2)])
    return rows


def wall_seconds(run: Run) -> float | None:
    """From start to end, of all parts; None where one was killed or the first ones are in another directory."""
    if not run.parts or run.parts[0]["after_step"] or any(part["ended"] is None for part in run.parts):
        return None
    times = [[datetime.fromisoformat(part[name]) for name in ("started", "ended")] for part in run.parts]
    return sum((ended - started).total_seconds() for started, ended in times)


def _units(part: Mapping[str, object] | None) -> int | None:
    """What a second costs: GPUs, or CPU cores, at work."""
    if part is None:
        return None
    return part["workers"] * (1 if part["device"] == "cuda" else part["threads_per_worker"])


def hardware(run: Run) -> list[tuple[str, str]]:
    """Hardware and versions of the newest part, name and value."""
    if not run.parts:
        return [("hardware and versions", UNKNOWN)]
    part = run.parts[-1]
    workers = f"{_count(part['workers'], 'worker')} on {_count(part['nodes'], 'node')}"
    memory = f"{part['cpu_cores']} cores, {part['memory_gigabytes']} GB of memory a node"
    return [
        ("workers", f"{workers}, {_count(part['threads_per_worker'], 'thread')} each"),
        ("GPU", ", ".join(part["gpus"]) or "none"),
        ("CPU", f"{part['cpu']}; {memory}"),
        ("system", part["system"]),
        *part["versions"].items(),
        ("CUDA", part["cuda"] or "none"),
        ("git commit", _commit(part["commit"])),
        ("peak memory of a worker", _peak(run)),
    ]


def differences(runs: Sequence[Run]) -> list[list[str]]:
    """Where runs differ, a column each, the first row the header: settings, and what they ran on."""
    rows = [["", *(run.name for run in runs)]]
    for name, values in differing([run.config for run in runs]).items():
        rows.append([name, *("" if value is None else _shown(value) for value in values)])
    rows.append(["ran on", *(_ran_on(run) for run in runs)])
    for name, read in {
        "torch": lambda part: part["versions"]["torch"],
        "git commit": lambda part: _commit(part["commit"]),
    }.items():
        rows.append([name, *(read(run.parts[-1]) if run.parts else UNKNOWN for run in runs)])
    return rows


def _ran_on(run: Run) -> str:
    return f"{_count(run.parts[-1]['workers'], 'worker')} on {device_name(run.parts[-1])}" if run.parts else UNKNOWN


def parts_table(run: Run) -> list[list[str]]:
    """When the run was started and went on, the first row the header."""
    rows = [["part", "started (UTC)", "after step", "workers", "ended by", "command"]]
    for number, part in enumerate(run.parts, 1):
        started = datetime.fromisoformat(part["started"]).strftime("%Y-%m-%d %H:%M:%S")
        outcome = part["outcome"] or "cut off"
        rows.append([str(number), started, str(part["after_step"]), str(part["workers"]), outcome, part["command"]])
    return rows if run.parts else []


def settings(run: Run, without: Collection[str] = ()) -> list[tuple[str, list[Setting]]]:
    """The resolved recipe by sections, with each setting's help, but for the names in `without`."""
    left = {name: value for name, value in run.config.items() if name not in without}
    sections = []
    for section in SECTIONS:
        own, default = [], section()
        for field in dataclasses.fields(section):
            if field.name in left:
                value = left.pop(field.name)
                changed = value != getattr(default, field.name)
                own.append(Setting(field.name, _shown(value), field.metadata["help"], changed))
        sections.append((section.__doc__.splitlines()[0].rstrip("."), own))
    if left:  # of another version of the program
        sections.append(("Others", [Setting(name, _shown(value), "", True) for name, value in left.items()]))
    return sections


def subtitle(run: Run) -> str:
    """What the run is, in a line."""
    config = run.config
    how = f"LoRA of rank {config.get('lora_r')}" if config.get("use_peft") else "full fine-tuning"
    sentiment = _shown(config.get("reward")).startswith("sentiment")
    judge = f" ({config.get('reward_model_path')})" if sentiment else ""
    started = f" · {run.parts[0]['started'][:10]}" if run.parts else ""
    return (
        f"{config.get('model_path')} · {how} · reward: {_shown(config.get('reward'))}{judge} · "
        f"openings of {config.get('dataset')} · seed {config.get('seed')}{started}"
    )


def device_name(part: Mapping[str, object]) -> str:
    """What did the work."""
    return part["gpus"][0] if part["gpus"] else part["cpu"]


def duration(seconds: float) -> str:
    """As 2.5 s, 3:12 or 1:02:03."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _commit(told: str | None) -> str:
    """The first twelve digits of a commit, and whether there were changes."""
    if told is None:
        return UNKNOWN
    commit, _, changes = told.partition(" ")
    return f"{commit[:12]} {changes}".strip()


def _peak(run: Run) -> str:
    peaks = [step.get("memory/peak_gigabytes") for step in run.steps]
    known = [peak for peak in peaks if peak is not None]
    return f"{max(known):.2f} GB" if known else UNKNOWN


def _range(interval: Sequence[float], digits: int = 3) -> str:
    low, high = interval
    return f"{low:.{digits}f} to {high:.{digits}f}"


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _shown(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, dict):
        return ", ".join(f"{name}={own}" for name, own in value.items())
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
