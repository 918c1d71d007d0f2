"""launch.sh and GPUs, which are pretended: the driver's tool, and a torch that says it finds them."""

import os

import pytest
import torch
from launching import ROOT
from test_launch import run

TORCH = """
class cuda:
    is_available = staticmethod(lambda: True)
    device_count = staticmethod(lambda: {count})
    get_device_capability = staticmethod(lambda index: {capability})
    get_arch_list = staticmethod(lambda: ["sm_75", "sm_90"])
"""


@pytest.fixture
def gpus(tmp_path):
    """Makes the environment of a machine with two GPUs, which the installed PyTorch finds only where it says so."""

    def make(capability: tuple[int, int] | None = None) -> dict[str, str]:
        tool = tmp_path / "nvidia-smi"
        tool.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100 (UUID: 1)'\necho 'GPU 1: NVIDIA H100 (UUID: 2)'\n")
        tool.chmod(0o755)
        environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
        if capability is not None:
            (tmp_path / "torch").mkdir()
            (tmp_path / "torch/__init__.py").write_text(TORCH.format(count=2, capability=capability))
            environment["PYTHONPATH"] = str(tmp_path)
        return environment

    return make


@pytest.mark.skipif(torch.version.cuda is not None, reason="this PyTorch may find a GPU")
def test_a_gpu_that_pytorch_cannot_use_is_an_error_unless_the_cpu_was_chosen(gpus, tiny_recipe):
    environment = gpus()
    done = run("--dry-run", tiny_recipe, **environment)
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
    assert "nvidia-smi lists GPU 0: NVIDIA H100 and 1 more, and PyTorch cannot use it: this torch" in done.stderr
    on_cpu = run("--dry-run", tiny_recipe, "--config", "cpu", **environment)
    assert on_cpu.returncode == 0 and "accelerate_configs/cpu.yaml" in on_cpu.stdout and on_cpu.stderr == ""
    hidden = run("--dry-run", tiny_recipe, CUDA_VISIBLE_DEVICES="", **environment)
    assert hidden.returncode == 0 and "accelerate_configs/cpu.yaml --num_processes 2" in hidden.stdout
    assert hidden.stderr == "CUDA_VISIBLE_DEVICES hides the GPUs: computing on the CPU.\n"


def test_gpus_are_counted_by_pytorch_and_all_that_multiply_bfloat16_do(gpus, tiny_recipe, tmp_path):
    environment = gpus((8, 0))

    def words(*arguments):
        done = run("--dry-run", tiny_recipe, *arguments, **environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    plain = words()
    assert "accelerate_configs/multi_gpu.yaml --num_processes 2 " in plain and "--mixed_precision bf16 " in plain
    assert "CUDA_VISIBLE_DEVICES" not in plain
    assert "--mixed_precision no " in words("--mixed_precision", "no")
    assert "--mixed_precision bf16 " in words("--config", "accelerate_configs/zero2.yaml"), "a shipped one by its path"
    own = tmp_path / "own.yaml"
    own.write_text((ROOT / "accelerate_configs/multi_gpu.yaml").read_text().replace("'no'", "fp16"))
    assert "--mixed_precision" not in words("--config", str(own)), "which says it itself"


def test_older_gpus_compute_in_float32(gpus, tiny_recipe):
    assert "--mixed_precision" not in run("--dry-run", tiny_recipe, **gpus((7, 5))).stdout


def test_an_optimizer_in_cpu_memory_gets_the_cpus_threads(gpus, tiny_recipe):
    environment = gpus((9, 0))
    for name in ("OMP_NUM_THREADS", "SLURM_CPUS_ON_NODE"):
        environment[name] = ""  # unset for launch.sh
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    line = run("--dry-run", tiny_recipe, "--config", "zero3_offload", **environment).stdout
    assert f"OMP_NUM_THREADS={threads} " in line
    assert "OMP_NUM_THREADS='' " in run("--dry-run", tiny_recipe, "--config", "zero3", **environment).stdout
