"""Whether PyTorch computes on GPUs here. One that is there and cannot be used is an error, never a run on the CPU.

    python -m pipeline.runtime.gpus    # for launch.sh: how many GPUs, and whether all of them multiply bfloat16

PyTorch is imported only where there may be a GPU: without one this takes the start of Python and nothing more.
"""

import glob
import importlib.util
import os
import subprocess
import sys
import warnings

from pipeline.errors import UserError, user_errors

PERHAPS = ("/dev/dxg", "/dev/kfd", "/dev/nvhost-gpu")  # WSL, AMD, Jetson: any graphics may have these, PyTorch knows
BFLOAT16 = (8, 0)  # compute capability from which bfloat16 products are native


class GpuError(UserError, RuntimeError):
    """A GPU is there and PyTorch cannot compute on it; the message says why and what helps."""


def gpus_are_hidden() -> bool:
    """Whether CUDA_VISIBLE_DEVICES was set so that no GPU is to be used."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1", "NoDevFiles")


def seen_gpu() -> str | None:
    """How a GPU shows without PyTorch, as the beginning of a sentence; None where none does."""
    listed = _nvidia_smi()
    if listed:
        more = f" and {len(listed) - 1} more" if len(listed) > 1 else ""
        return f"nvidia-smi lists {listed[0].partition(' (UUID')[0]}{more}"
    # A job's cgroup may refuse it a node's devices, whose files are there all the same.
    files = [path for path in sorted(glob.glob("/dev/nvidia[0-9]*")) if os.access(path, os.R_OK | os.W_OK)]
    return f"there is {files[0]}" if files else None


def cuda_is_usable() -> bool:
    """Whether to compute on GPUs.

    Raises:
        GpuError: a GPU is there that PyTorch cannot use, and nobody has chosen the CPU.
    """
    import torch

    if os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true":  # accelerate launch --cpu, or use_cpu: true
        return False
    if torch.cuda.is_available():
        _check_kernels()
        return True
    seen = None if gpus_are_hidden() else seen_gpu()
    if seen is not None:
        raise GpuError(f"{seen}, and PyTorch cannot use it: {_why_not()} {_remedies()}")
    return False


def _nvidia_smi() -> list[str]:
    """The GPUs that the driver's own tool lists, a line each; none where there is no such tool or driver."""
    try:
        told = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line for line in told.stdout.splitlines() if line.startswith("GPU")]


def _why_not() -> str:
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        return f"this torch ({torch.__version__}) is a CPU-only build."
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    hint = "" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible})"
    try:
        torch.cuda.init()
    except Exception as error:  # of several types
        return f"{str(error).splitlines()[0].rstrip('.')}{hint}."
    return f"it counts none{hint}."


def _check_kernels() -> None:
    """Raise `GpuError` where a GPU is older than all that this torch has kernels for."""
    import torch

    built = [int(name.removeprefix("sm_").rstrip("af")) for name in torch.cuda.get_arch_list() if name[:3] == "sm_"]
    for index in range(torch.cuda.device_count() if built else 0):
        major, minor = torch.cuda.get_device_capability(index)
        if 10 * major + minor < min(built):
            raise GpuError(
                f"{torch.cuda.get_device_name(index)} has compute capability {major}.{minor}, and this torch "
                f"({torch.__version__}) has kernels from {min(built) / 10} on. {_remedies()}"
            )


def _remedies() -> str:
    return (
        "Update the GPU's driver, or install the torch of requirements.txt built for the CUDA that the driver has "
        "(https://pytorch.org/get-started); or choose the CPU: ./launch.sh --config cpu …, without launch.sh "
        "CUDA_VISIBLE_DEVICES= before the command."
    )


def main() -> None:
    """Print the number of GPUs and bf16, or no where one of them lacks it."""
    warnings.simplefilter("ignore")  # what PyTorch warns of is in the error
    if gpus_are_hidden():
        if seen_gpu() is not None:
            print("CUDA_VISIBLE_DEVICES hides the GPUs: computing on the CPU.", file=sys.stderr)
        print("0 no")
        return
    if seen_gpu() is None and not any(map(os.path.exists, PERHAPS)):
        print("0 no")
        return
    if importlib.util.find_spec("torch") is None:  # a dry run before the environment is made
        print("PyTorch is not installed yet; where all GPUs have bf16, that will be the precision.", file=sys.stderr)
        print(len(_nvidia_smi()), "no")
        return
    with user_errors():
        usable = cuda_is_usable()
    import torch

    capabilities = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())] if usable else []
    print(len(capabilities), "bf16" if capabilities and min(capabilities) >= BFLOAT16 else "no")


if __name__ == "__main__":
    main()
