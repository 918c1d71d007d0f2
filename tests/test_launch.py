"""launch.sh as a user meets it."""

import os
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
from launching import ROOT, metrics, user_environment
from transformers import AutoModelForCausalLM


def run(*arguments: str, script: str | Path = "./launch.sh", **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [script, *arguments], cwd=ROOT, env=user_environment(**environment), capture_output=True, text=True, timeout=240
    )


def planned(*arguments: str, **environment: str) -> list[str]:
    """The lines of a dry run on CPU, in float32."""
    done = run("--dry-run", "--mixed_precision", "no", *arguments, OMP_NUM_THREADS="1", **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def wait_for_steps(directory: Path, steps: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not (directory / "metrics.jsonl").exists() or len(metrics(directory)) < steps:
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.2)


def test_help_names_every_way_to_call_it():
    shown = run("--help")
    assert shown.returncode == 0
    for word in (
        "recipes/quickstart.yaml",
        "test",
        "sbatch",
        "--dry-run",
        "--config",
        "--num_processes",
        "--mixed_precision",
    ):
        assert word in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["recipes/none.yaml"], "there is no recipe recipes/none.yaml; those shipped: recipes/"),
        (["--config", "none"], "there is no accelerate configuration none; those shipped: accelerate_configs/"),
        (["sft"], "./launch.sh sft needs a recipe; those shipped: recipes/sft_gpt2_imdb.yaml "),
        (["reward_model"], "needs a recipe; those shipped: recipes/reward_distilbert_imdb.yaml "),
        (["--config", "recipes/negative.yaml"], "that is a recipe: ./launch.sh recipes/negative.yaml"),
        (["accelerate_configs/zero2.yaml"], "./launch.sh RECIPE --config accelerate_configs/zero2.yaml"),
    ],
)
def test_a_file_that_is_missing_or_of_another_kind_is_named_before_anything_is_started(arguments, message):
    done = run(*arguments)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("program", ("train", "sft", "reward_model"))
def test_the_program_is_the_command_word_whatever_the_recipe_is_called(tmp_path, program):
    recipe = tmp_path / ("sft_clip.yaml" if program == "reward_model" else "reward_clip.yaml")
    recipe.write_text("steps: 3\n")
    words = [] if program == "train" else [program]
    (line,) = planned(*words, str(recipe))
    assert f"-m pipeline.{program} --config {recipe}" in line
    assert ("--num_processes 2" in line) == (program == "train")


def test_a_program_is_no_settings_value(tiny_recipe):
    (line,) = planned("train", tiny_recipe, "--dataset_split", "sft", "--config", "cpu")
    assert f"-m pipeline.train --config {tiny_recipe} --dataset_split sft " in line


def test_a_configuration_of_ones_own_needs_no_more_than_accelerate_does(tmp_path, tiny_recipe):
    config = tmp_path / "mine.yaml"
    config.write_text("num_processes: 3\ndeepspeed_config:\n  zero_stage: 2\n  steps_per_print: 9\n")
    assert "--num_processes 3" in planned(tiny_recipe, "--config", str(config))[0]


def test_a_recipes_frontier_is_estimated_by_the_same_workers_and_precision_as_its_training():
    training, frontier = run("--dry-run"), run("frontier", "--dry-run")
    assert frontier.returncode == 0 and "-m pipeline.frontier --config recipes/quickstart.yaml" in frontier.stdout

    def words(done):
        return re.sub(r"--main_process_port \d+", "", done.stdout).replace("pipeline.frontier", "pipeline.train")

    assert words(frontier) == words(training)


def test_a_bad_setting_ends_all_workers_with_one_line_and_exit_code_2(tmp_path, tiny_recipe):
    done = run(tiny_recipe, "--minibatch_size", "7", "--output_dir", str(tmp_path / "run"), "--config", "cpu")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "error: rollout_batch_size=16 is not a multiple of minibatch_size=7; 14 or 21 would do."
    )
    assert "Traceback" not in done.stderr and done.stderr.count("error:") == 1


def test_ctrl_c_ends_two_workers_at_a_step_and_saves(tmp_path, tiny_recipe):
    directory = tmp_path / "run"
    command = ["./launch.sh", tiny_recipe, "--steps", "100000", "--output_dir", str(directory), "--config", "cpu"]
    process = subprocess.Popen(
        command, cwd=ROOT, env=user_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    wait_for_steps(directory, 2, process)
    os.killpg(process.pid, signal.SIGINT)  # as the terminal does
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Stopped by SIGINT after" in output and "Traceback" not in errors
    AutoModelForCausalLM.from_pretrained(directory)
    assert len(metrics(directory)) >= 2


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return str(probe.getsockname()[1])


def test_two_machines_train_one_model_and_a_signal_to_either_ends_both_with_its_exit_code(tmp_path, tiny_recipe):
    directory = tmp_path / "run"
    command = ["./launch.sh", tiny_recipe, "--config", "cpu", "--num_processes", "1", "--num_machines", "2"]
    command += ["--main_process_ip", "127.0.0.1", "--main_process_port", free_port()]
    command += ["--steps", "100000", "--output_dir", str(directory)]
    machines = [
        subprocess.Popen(
            [*command, "--machine_rank", str(rank)], cwd=ROOT, env=user_environment(), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]  # fmt: skip
    wait_for_steps(directory, 2, machines[0])
    machines[1].send_signal(signal.SIGUSR1)
    outputs = [machine.communicate(timeout=60) for machine in machines]
    assert [machine.returncode for machine in machines] == [138, 138], outputs
    assert "2 workers on cpu" in outputs[0][0] and "Stopped by SIGUSR1 after" in outputs[0][0]
    assert outputs[1][0] == "", "only rank zero speaks"


def test_several_machines_need_to_know_each_other():
    done = run("--num_machines", "2", "--machine_rank", "0")
    assert done.returncode == 2 and "--main_process_ip and --main_process_port as well" in done.stderr


def test_a_port_in_use_is_named_before_anything_is_started(tiny_recipe):
    with socket.create_server(("", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = run(tiny_recipe, "--main_process_port", port)
        rank_1 = ["--num_machines", "2", "--main_process_ip", "127.0.0.1", "--machine_rank", "1"]
        elsewhere = planned(tiny_recipe, "--main_process_port", port, *rank_1)
    assert done.returncode == 2 and f"port {port} is in use on this machine; choose another" in done.stderr
    assert f"--main_process_port {port}" in elsewhere[0], "the port is rank zero's"


def test_a_dry_run_prints_the_command(tiny_recipe):
    assert planned(
        tiny_recipe, "--config", "cpu", "--main_process_port", "12345", "--kl_coef", "0.1", "--dataset", "my data"
    ) == [
        "PIPELINE_PROCESSES=2 OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES='' accelerate launch --quiet "
        "--config_file accelerate_configs/cpu.yaml --num_processes 2 --main_process_port 12345 --mixed_precision no "
        f"-m pipeline.train --config {tiny_recipe} --kl_coef 0.1 --dataset my\\ data "
    ]


# A job of 2 nodes, as SLURM's variables and `scontrol` describe it.
SCONTROL = """#!/bin/sh
case "$2" in
  hostnames) echo red7; echo red8 ;;
  node) echo "NodeName=$4 Arch=x86_64 NodeAddr=10.1.2.${{4#red}} NodeHostName=$4 Version=22.05.8" ;;
  job) printf 'JobId=%s JobName=ppo\n   Command={script} recipes/X.yaml\n   WorkDir=/home\n' "$3" ;;
esac
"""
JOB = {"SLURM_JOB_ID": "4321", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "red[7-8]"}


@pytest.fixture
def job(tmp_path):
    """The environment of a job in which `ROOT/launch.sh` was submitted."""
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(SCONTROL.format(script=ROOT / "launch.sh"))
    scontrol.chmod(0o755)
    return {**JOB, "PATH": f"{scontrol.parent}:{os.environ['PATH']}"}


def test_in_a_job_srun_starts_one_launcher_a_node(job):
    srun, _, launcher = planned(
        "recipes/gpt2_imdb.yaml", "--config", "multi_gpu", "--num_processes", "4", SLURM_CPUS_PER_TASK="16", **job
    )
    options = (
        "--quiet --config_file accelerate_configs/multi_gpu.yaml --num_processes 8 --main_process_port 23210 "
        "--num_machines 2 --main_process_ip 10.1.2.7 --rdzv_backend static --mixed_precision no "
        "-m pipeline.train --config recipes/gpt2_imdb.yaml"
    )
    assert srun.strip() == (
        "PIPELINE_PROCESSES=8 OMP_NUM_THREADS=1 srun --nodes=2 --ntasks=2 --ntasks-per-node=1 --kill-on-bad-exit=1 "
        f"--wait=0 --export=ALL --cpu-bind=none --cpus-per-task=16 {ROOT}/launch.sh on_node {options}"
    )
    assert launcher.strip() == f"accelerate launch --machine_rank $SLURM_NODEID {options}"


def test_jobs_have_ports_of_their_own(job):
    ports = set()
    for number in ("4321", "4322"):
        srun = planned("--config", "cpu", **{**job, "SLURM_JOB_ID": number})[0].split()
        ports.add(srun[srun.index("--main_process_port") + 1])
    with socket.create_server(("", 23210)):  # as an earlier start of the job may have left it
        srun = planned("--config", "cpu", **job)[0].split()
        ports.add(srun[srun.index("--main_process_port") + 1])
    assert ports == {"23210", "23220", "23211"}


def test_deepspeed_finds_the_other_nodes_started(job):
    assert "--deepspeed_multinode_launcher standard" in planned("--config", "zero2", **job)[0]
    assert "--deepspeed_multinode_launcher" not in planned("--config", "zero2")[0]


def test_in_a_job_the_machines_are_slurms(job):
    done = run("--num_machines", "2", **job)
    assert done.returncode == 2 and "leave --num_machines" in done.stderr


def test_in_a_step_of_a_job_the_machine_is_all_there_is(job):
    (line,) = planned("--config", "cpu", SLURM_STEP_ID="0", **job)
    assert "srun" not in line and line.startswith("PIPELINE_PROCESSES=2 ")


def test_a_task_a_worker_is_refused(job):
    done = run("--dry-run", SLURM_STEP_ID="0", SLURM_STEP_NUM_TASKS="8", **job)
    assert done.returncode == 2 and "srun has started 8 of this script" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "directory"),
    [
        (["recipes/quickstart.yaml"], "runs/quickstart/seed_3"),
        (["recipes/quickstart.yaml", "--output_dir", "runs/x/"], "runs/x/seed_3"),
        (["recipes/quickstart.yaml", "--output_dir=runs/x"], "runs/x/seed_3"),
        (["{recipe}"], "my runs/x/seed_3"),
    ],
)
def test_the_jobs_of_an_array_are_seeds(tmp_path, job, arguments, directory):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("steps: 3\noutput_dir: 'my runs/x'  # all of mine\n")
    arguments = [argument.format(recipe=recipe) for argument in arguments]
    srun = planned(*arguments, **{**job, "SLURM_ARRAY_TASK_ID": "3"})[0]
    assert srun.rstrip().endswith(f"--seed 3 --output_dir {directory}".replace("my runs", "my\\ runs"))


@pytest.mark.parametrize("setting", [["--seed", "5"], ["--seed=5"]])
def test_an_array_with_a_seed_of_its_own_is_refused(job, setting):
    done = run(*setting, **{**job, "SLURM_ARRAY_TASK_ID": "3"})
    assert done.returncode == 2 and "a job array gives the seeds (--seed 3 here)" in done.stderr


def test_the_copy_that_sbatch_runs_finds_the_project(tmp_path, job):
    spooled = tmp_path / "slurm_script"
    shutil.copy(ROOT / "launch.sh", spooled)
    done = run("--dry-run", script=spooled, **job)
    assert done.returncode == 0 and f"{ROOT}/launch.sh on_node" in done.stdout, done.stderr
    Path(job["PATH"].split(":")[0], "scontrol").write_text("#!/bin/sh\nexit 1\n")
    done = run("--dry-run", script=spooled, SLURM_SUBMIT_DIR=str(tmp_path), **job)
    assert done.returncode == 2
    assert f"or in the directory of submission ({tmp_path}). Submit it in the project" in done.stderr
