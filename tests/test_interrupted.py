"""A disk that refuses a file, or a signal after the training: one line, the right exit code, nothing lost."""

import gc
import resource
import signal
from contextlib import contextmanager

import pytest
from launching import metrics, run_here

from pipeline import evaluate, frontier, train
from pipeline.errors import BAD_SETTINGS, REWARD_FAILED, WRITE_FAILED
from pipeline.runtime.tracking import MetricsFile

ROOM = 30_000  # bytes of a file: settings and metrics fit, weights do not


@contextmanager
def file_size_limit(limit: int):
    """What `ulimit -f` does, for the time being."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def start(tiny_recipe, run, capfd, monkeypatch, tmp_path):
    """Run a command with the tiny recipe: (exit code, what it printed)."""

    def start(*settings, main=train.main):
        code = run_here(main, "--config", tiny_recipe, "--output_dir", run, *settings)
        gc.collect()  # the lock of a run that failed in this process
        return code, "".join(capfd.readouterr())

    (tmp_path / "huge_rewards.py").write_text(
        "def huge(prompts, responses):\n"
        "    return [3e38 * (-1) ** i * (len(responses) > 2) for i in range(len(responses))]  # the probe passes\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    return start


def one_error(said: str) -> str:
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in said
    return line


def interrupt_in(monkeypatch, place: str, number: int) -> list[int]:
    """Send a signal in the first call of a function; the list grows with each call."""
    module, _, name = place.rpartition(".")
    calls, function = [], getattr(__import__(module, fromlist=[name]), name)

    def interrupted(*arguments, **settings):
        if not calls:
            signal.raise_signal(number)
        calls.append(1)
        return function(*arguments, **settings)

    monkeypatch.setattr(place, interrupted)
    return calls


def test_a_first_checkpoint_that_cannot_be_written_ends_the_run_before_it_trains(start, run):
    with file_size_limit(ROOM):
        code, said = start()
    assert code == BAD_SETTINGS
    assert f"no checkpoint could be written into {run / 'checkpoints'}" in (error := one_error(said))
    assert "Nothing was trained" in error and ("limit" in error or "File too large" in error)
    assert metrics(run) == [] and not (run / "finished").exists()


def test_a_model_that_cannot_be_written_is_one_error_at_the_end(start, run):
    with file_size_limit(ROOM):
        code, said = start("--save_every_steps", "0", "--steps", "1")
    assert code == WRITE_FAILED and f"error: the model in {run} could not be written: " in one_error(said)
    assert "File too large" in said and len(metrics(run)) == 1
    assert not list(run.glob("*.safetensors")) and not (run / "finished").exists()


def test_an_evaluation_that_cannot_be_written_is_made_again_without_training_again(start, run, monkeypatch):
    def full(*_arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.reporting.write_evaluation", full)
        code, said = start("--save_every_steps", "0", "--steps", "1")
    assert code == WRITE_FAILED and "evaluation.json could not be written: No space left on device" in one_error(said)
    assert "Before and after" in said and not (run / "finished").exists()
    code, said = start("--save_every_steps", "0", "--steps", "1")
    assert code == 0 and "after step 1" in said and "step 1/1" not in said
    assert (run / "evaluation.json").exists() and (run / "finished").exists()


def test_metrics_that_find_no_room_wait_and_are_written_whole(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    file.write({"step": 1.0})
    with file_size_limit(20):
        for step in (2.0, 3.0):
            with pytest.raises(OSError, match="File too large"):
                file.write({"step": step})
        assert path.read_text() == '{"step": 1.0}\n' and len(file.waiting) == 2
    file.flush()
    assert path.read_text() == "".join(f'{{"step": {step}}}\n' for step in (1.0, 2.0, 3.0))


def test_a_signal_ends_the_evaluation_within_a_batch_and_it_is_made_again(start, run, monkeypatch, capfd):
    with monkeypatch.context() as patch:
        sampled = interrupt_in(patch, "pipeline.evaluation.sample_responses", signal.SIGTERM)
        code, said = start("--save_every_steps", "0", "--steps", "1")
    assert code == 143 and len(sampled) == 1, "of four batches"
    assert "Stopped by SIGTERM in the evaluation after 1 of 1 steps" in said and "makes the evaluation again" in said
    assert not (run / "finished").exists() and not (run / "evaluation.json").exists()
    code, said = start("--save_every_steps", "0", "--steps", "1")
    assert code == 0 and "step 1/1" not in said and len(metrics(run)) == 1
    assert (run / "evaluation.json").exists() and (run / "finished").exists()
    with monkeypatch.context() as patch:
        sampled = interrupt_in(patch, "pipeline.evaluation.sample_responses", signal.SIGUSR1)
        assert run_here(evaluate.main, run) == 138 and len(sampled) == 1
    assert "Stopped by SIGUSR1." in capfd.readouterr().err


def test_a_signal_ends_the_frontier(start, tmp_path, monkeypatch):
    calls = interrupt_in(monkeypatch, "pipeline.frontier_samples._scores", signal.SIGINT)
    path = tmp_path / "frontier.json"
    code, said = start("--frontier", path, "--frontier_prompts", "2", "--frontier_samples", "8", main=frontier.main)
    assert code == 130 and len(calls) == 1 and "Stopped by SIGINT." in said and not path.exists()


def test_a_reward_too_large_for_float32_is_named_before_it_spoils_an_update(start, run):
    code, said = start("--reward", "huge_rewards:huge")
    assert code == REWARD_FAILED and metrics(run) == []
    assert "the reward huge_rewards:huge is 3e+38 for prompt" in (error := one_error(said))
    assert "learning_rate" not in error
    assert start("--reward", "huge_rewards:huge", "--reward_clip", "5", "--steps", "1", "--resume", "never")[0] == 0
