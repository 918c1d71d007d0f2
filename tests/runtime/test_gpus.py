"""A GPU that is there and cannot be used is an error with the reason; a machine without one is asked in a moment."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline import chat, reward_model, sft
from pipeline.runtime import gpus
from pipeline.runtime.distributed import make_accelerator
from pipeline.runtime.gpus import GpuError, cuda_is_usable

H100 = "GPU {}: NVIDIA H100 80GB HBM3 (UUID: GPU-5f)"


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Puts a driver's tool that lists two GPUs before all others on the path."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\necho '{H100.format(0)}'\necho '{H100.format(1)}'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def no_cuda(*_arguments):
    raise RuntimeError("The NVIDIA driver on your system is too old (found version 12020).\nmore")


def test_without_a_gpu_there_is_none_to_use(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(gpus.glob, "glob", lambda _pattern: [])
    assert cuda_is_usable() is False


def test_a_cpu_only_pytorch_beside_a_gpu_is_named_with_the_remedies(nvidia_smi, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(GpuError) as error:
        cuda_is_usable()
    assert str(error.value).startswith(
        f"nvidia-smi lists GPU 0: NVIDIA H100 80GB HBM3 and 1 more, and PyTorch cannot use it: this torch "
        f"({torch.__version__}) is a CPU-only build. Update the GPU's driver, or install"
    )
    assert "./launch.sh --config cpu" in str(error.value) and "CUDA_VISIBLE_DEVICES= before" in str(error.value)


def test_a_driver_that_is_too_old_is_named_as_pytorch_names_it(nvidia_smi, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", no_cuda)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    with pytest.raises(GpuError, match=r"too old \(found version 12020\) \(CUDA_VISIBLE_DEVICES=7\)\. Update"):
        cuda_is_usable()


@pytest.mark.parametrize(
    ("name", "value"), [("CUDA_VISIBLE_DEVICES", ""), ("CUDA_VISIBLE_DEVICES", "-1"), ("ACCELERATE_USE_CPU", "True")]
)
def test_who_chose_the_cpu_gets_it(nvidia_smi, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert cuda_is_usable() is False


@pytest.mark.parametrize("allowed", (True, False))
def test_a_devices_file_counts_only_where_the_job_may_open_it(monkeypatch, allowed):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(gpus.glob, "glob", lambda _pattern: ["/dev/nvidia1", "/dev/nvidia0"])
    monkeypatch.setattr(gpus.os, "access", lambda _path, _mode: allowed)
    assert gpus.seen_gpu() == ("there is /dev/nvidia0" if allowed else None)


@pytest.mark.parametrize(
    "start", [make_accelerator, sft.main, reward_model.main, lambda: chat.open_chat(Path("run"), None)]
)
def test_no_command_falls_back_to_the_cpu(nvidia_smi, monkeypatch, start):
    monkeypatch.setattr(sys, "argv", ["command"])
    with pytest.raises(GpuError, match="nvidia-smi lists"):
        start()


def use_devices(monkeypatch, *capabilities: tuple[int, int], built=("sm_75", "sm_80", "sm_90", "sm_120")):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU number {index}")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: list(built))


def test_a_gpu_older_than_pytorchs_kernels_is_named(monkeypatch):
    use_devices(monkeypatch, (9, 0), (7, 0))
    with pytest.raises(GpuError, match=r"GPU number 1 has compute capability 7\.0, .* has kernels from 7\.5 on"):
        cuda_is_usable()


@pytest.mark.parametrize(
    ("capabilities", "told"), [([(8, 0), (9, 0)], "2 bf16"), ([(9, 0), (7, 5)], "2 no"), ([(12, 0)], "1 bf16")]
)
def test_the_launcher_is_told_how_many_there_are_and_whether_all_have_bfloat16(
    nvidia_smi, monkeypatch, capsys, capabilities, told
):
    use_devices(monkeypatch, *capabilities)
    gpus.main()
    assert capsys.readouterr().out == f"{told}\n"


def test_without_a_gpu_the_launcher_is_told_so_without_pytorch():
    script = (
        "import sys\nfrom pipeline.runtime import gpus\ngpus.main()\nassert not {'torch', 'numpy'} & set(sys.modules)"
    )
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True,
                          env={"PATH": "/nowhere", "PYTHONPATH": ":".join(sys.path)})  # fmt: skip
    assert told.stdout == "0 no\n" and told.stderr == ""


def test_the_launcher_may_ask_before_anything_is_installed():
    command = [sys.executable, "-S", "-m", "pipeline.runtime.gpus"]
    asked = subprocess.run(command, cwd=Path(__file__).parents[2], env={"PATH": ""}, capture_output=True, text=True)
    assert asked.returncode == 0 and asked.stdout.endswith(" no\n"), asked.stderr
