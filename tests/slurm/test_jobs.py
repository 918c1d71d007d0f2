"""`sbatch launch.sh` on a real SLURM of two nodes: training, signals, requeueing, arrays, crashes."""

import time
from pathlib import Path

import pytest
import yaml
from cluster import KILL_WAIT, Cluster, running_cluster
from launching import ROOT, figures, launch, metrics, user_environment
from transformers import AutoModelForCausalLM

CPU = ["--config", "cpu", "--num_processes", "1", "--mixed_precision", "no"]


@pytest.fixture(scope="module")
def cluster():
    """Two nodes of 8 CPUs and 4 GPUs, both pretended; skips where Debian's SLURM cannot be had."""
    with running_cluster() as running:
        yield running


class Job:
    """A submitted `launch.sh`."""

    def __init__(self, cluster: Cluster, directory: Path, sbatch: list[str], arguments: list[str], **environment: str):
        self.cluster = cluster
        self.log_file = directory / "job.log"
        self.number = cluster.call(
            "sbatch", "--parsable", f"--output={self.log_file}", f"--chdir={directory}", *sbatch,
            str(ROOT / "launch.sh"), *arguments, env=user_environment(OMP_NUM_THREADS="1", **environment),
        )  # fmt: skip

    @property
    def log(self) -> str:
        return self.log_file.read_text() if self.log_file.exists() else "no log"

    def wait(self, state: str, exit_code: int, seconds: float = 600) -> dict[str, str]:
        """Wait until the job has ended, as it should."""
        job = self.cluster.wait(self.number, seconds)
        assert (job["JobState"], job["ExitCode"]) == (state, f"{exit_code}:0"), self.log
        # At the line's start, a worker's; torchrun logs one where the first node's launcher ends before it.
        assert "\nTraceback" not in self.log or state == "FAILED", self.log
        assert not list((ROOT / "runs").glob(f".slurm-{self.number}-*")), "a status file was left behind"
        return job

    def wait_for_steps(self, run: Path, steps: int, seconds: float = 600) -> None:
        deadline = time.monotonic() + seconds
        while not (run / "metrics.jsonl").exists() or len(metrics(run)) < steps:
            assert self.cluster.job(self.number)["JobState"] in ("PENDING", "RUNNING"), self.log
            assert time.monotonic() < deadline, self.log
            time.sleep(0.2)

    def wait_until_requeued(self, times: int) -> None:
        """Wait until SLURM has the job back in its queue, and have it start now instead of in two minutes."""
        deadline = time.monotonic() + 600
        while (job := self.cluster.job(self.number))["Restarts"] != str(times) or job["JobState"] != "PENDING":
            assert time.monotonic() < deadline and job["JobState"] != "FAILED", self.log
            time.sleep(0.2)
        time.sleep(2.5)  # SLURM refuses to start a job within the second after it ended
        self.cluster.call("scontrol", "update", f"jobid={self.number}", "StartTime=now")


def test_two_nodes_train_as_one_machine_with_two_workers_does(cluster, tmp_path, tiny_recipe):
    run, alone = tmp_path / "run", tmp_path / "alone"
    job = Job(cluster, tmp_path, ["--nodes=2", "--gpus-per-node=4"], [tiny_recipe, *CPU, "--output_dir", str(run)])
    job.wait("COMPLETED", 0)
    assert "2 workers on cpu" in job.log
    done = launch(2, ["-m", "pipeline.train", "--config", tiny_recipe, "--output_dir", str(alone)])
    assert done.returncode == 0, done.stderr
    assert figures(run) == figures(alone)
    assert (run / "evaluation.json").read_text() == (alone / "evaluation.json").read_text()


def test_two_nodes_train_the_quickstart(cluster, tmp_path):
    run = tmp_path / "run"
    few = ["--steps", "2", "--rollout_batch_size", "16", "--minibatch_size", "8", "--evaluation_prompts", "8"]
    job = Job(cluster, tmp_path, ["--nodes=2"], ["recipes/quickstart.yaml", *CPU, *few, "--output_dir", str(run)])
    job.wait("COMPLETED", 0)
    assert len(metrics(run)) == 2
    AutoModelForCausalLM.from_pretrained(run)


def test_scancel_ends_a_job_with_what_it_learned(cluster, tmp_path, tiny_recipe):
    run = tmp_path / "run"
    arguments = [tiny_recipe, *CPU, "--steps", "100000", "--output_dir", str(run)]
    job = Job(cluster, tmp_path, ["--nodes=2"], arguments)
    job.wait_for_steps(run, 2)
    cluster.call("scancel", job.number)
    assert job.wait("CANCELLED", 143)["Restarts"] == "0"
    assert "Stopped by SIGTERM after" in job.log
    AutoModelForCausalLM.from_pretrained(run)


def test_an_array_trains_a_seed_a_job_and_a_crash_ends_one_alone(cluster, tmp_path, tiny_recipe):
    # SLURM numbers the array after its last job: what ends that one must not end all.
    (tmp_path / "crashing.py").write_text(
        "import os, time\nfrom pipeline.trainer import PPOTrainer\n"
        "draw = PPOTrainer.draw_prompts\n"
        "def crash(self, step):\n"
        "    if os.environ['SLURM_ARRAY_TASK_ID'] == '3':\n        raise RuntimeError('out of order')\n"
        "    time.sleep(5)\n    return draw(self, step)\n"
        "PPOTrainer.draw_prompts = crash\n"
        "def score(prompts, responses):\n    return [float(len(text)) for text in responses]\n"
    )
    settings = ["--steps", "1", "--evaluation_prompts", "0", "--reward", "crashing:score"]
    job = Job(
        cluster, tmp_path, ["--array=0-3"], [tiny_recipe, *CPU, *settings, "--output_dir", str(tmp_path / "runs")],
        PYTHONPATH=f"{tmp_path}:{ROOT}",
    )  # fmt: skip
    states = [cluster.wait(f"{job.number}_{seed}", 600)["JobState"] for seed in range(4)]
    assert states == ["COMPLETED"] * 3 + ["FAILED"], job.log
    rewards = set()
    for seed in range(3):
        run = tmp_path / "runs" / f"seed_{seed}"
        assert yaml.safe_load((run / "config.yaml").read_text())["seed"] == seed
        rewards.add(metrics(run)[0]["reward/mean"])
    assert len(rewards) == 3


def test_a_crash_on_one_node_ends_the_job_at_once_with_its_traceback(cluster, tmp_path, tiny_recipe):
    # Gloo tells a waiting worker at once that another is gone; NCCL may let it wait, and so does the sleep.
    (tmp_path / "crashing.py").write_text(
        "import os, time\nfrom pathlib import Path\nfrom pipeline.trainer import PPOTrainer\n"
        "def crash(self, rollout):\n"
        "    if os.environ['RANK'] == '1':\n"
        f"        Path({str(tmp_path)!r}, 'crashed').touch()\n        raise RuntimeError('out of order')\n"
        "    time.sleep(1000)\n"
        "PPOTrainer.advantages = crash\n"
        "def score(prompts, responses):\n    return [0.0] * len(responses)\n"
    )
    settings = ["--reward", "crashing:score", "--output_dir", str(tmp_path / "run")]
    job = Job(cluster, tmp_path, ["--nodes=2"], [tiny_recipe, *CPU, *settings], PYTHONPATH=f"{tmp_path}:{ROOT}")
    job.wait("FAILED", 1)
    assert time.time() - (tmp_path / "crashed").stat().st_mtime < KILL_WAIT / 2, job.log
    assert "RuntimeError: out of order" in job.log and "the first traceback says why" in job.log


def test_a_job_stopped_for_time_and_then_preempted_is_requeued_and_ends_as_if_undisturbed(
    cluster, tmp_path, tiny_recipe
):
    run, alone = tmp_path / "run", tmp_path / "alone"
    (tmp_path / "slow.py").write_text(
        "import os, time\n"
        "def score(prompts, responses):\n"
        "    time.sleep(float(os.environ.get('SLOW', '0')))\n"  # or the job ends before the signals
        "    return [float(len(text)) for text in responses]\n"
    )
    settings = ["--reward", "slow:score", "--steps", "16", "--evaluation_prompts", "0"]
    path = f"{tmp_path}:{ROOT}"
    job = Job(
        cluster, tmp_path, ["--nodes=2", "--partition=low"], [tiny_recipe, *CPU, *settings, "--output_dir", str(run)],
        PYTHONPATH=path, SLOW="0.5",
    )  # fmt: skip
    job.wait_for_steps(run, 2)
    cluster.call("scancel", "--signal=USR1", "--batch", job.number)  # as SLURM does before the time limit
    job.wait_until_requeued(1)
    job.wait_for_steps(run, 5)
    urgent = cluster.call(
        "sbatch", "--parsable", "--nodes=2", "--exclusive", "--partition=high", "--output=/dev/null", "--wrap=true"
    )
    job.wait_until_requeued(2)
    cluster.wait(urgent, 60)
    assert job.wait("COMPLETED", 0)["Restarts"] == "2"
    done = launch(
        2, ["-m", "pipeline.train", "--config", tiny_recipe, *settings, "--output_dir", str(alone)],
        env={"PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert figures(run) == figures(alone)
    assert job.log.count("Going on from") == 2
