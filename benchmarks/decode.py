"""Sampling a batch with the pipeline's decoder and with transformers' `generate`, in turn; prints ratios.

    python -m benchmarks.decode                     # GPT-2 124 M, 32 x (8 + 24) tokens, float32 and bfloat16
    python -m benchmarks.decode --batch 256         # on a GPU

In bfloat16 `generate` has a model converted to bfloat16, which is faster than its running under autocast; the decoder
runs under autocast with float32 weights, as training does, conversion included.
"""

import argparse
import json
import os
import platform

import torch
from transformers import AutoModelForCausalLM, GPT2Config

from benchmarks.work import best_seconds, save_result, spread, under_launch_settings
from pipeline.data.prompts import PromptBatch
from pipeline.models.kernels import use_fast_kernels
from pipeline.rollout.graphs import DecodeGraphs
from pipeline.rollout.rollout import sample_responses
from pipeline.rollout.sampling import SamplingOptions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, value in (("batch", 32), ("prompt", 8), ("response", 24), ("rounds", 8)):
        parser.add_argument(f"--{name}", type=int, default=value)
    arguments = parser.parse_args()
    under_launch_settings()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(GPT2Config(pad_token_id=0)).eval().to(device)
    ours = AutoModelForCausalLM.from_config(GPT2Config(pad_token_id=0)).eval()
    ours = use_fast_kernels(ours, device).to(device)
    tokens = torch.randint(1, 50000, (arguments.batch, arguments.prompt), device=device)
    prompts = PromptBatch(tokens, torch.ones_like(tokens).bool(), [""] * arguments.batch)
    uniforms = torch.rand(arguments.batch, arguments.response)
    lengths = torch.full((arguments.batch,), arguments.response)
    graphs = DecodeGraphs() if device.type == "cuda" else None

    def generate() -> None:
        plain.generate(
            tokens, attention_mask=torch.ones_like(tokens), do_sample=True, top_k=0,
            max_new_tokens=arguments.response, min_new_tokens=arguments.response,
        )  # fmt: skip

    def decode() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=plain.dtype == torch.bfloat16):
            sample_responses(
                ours, prompts, uniforms, lengths, microbatch_size=arguments.batch, eos_token_id=-1, pad_token_id=0,
                options=SamplingOptions(), graphs=graphs,
            )  # fmt: skip

    result = {}
    for dtype in (torch.float32, torch.bfloat16):
        plain.to(dtype)
        pairs = [(best_seconds(generate, 1, device), best_seconds(decode, 1, device)) for _ in range(arguments.rounds)]
        result[str(dtype).removeprefix("torch.")] = {
            "generate_seconds": spread([a for a, _ in pairs]),
            "decode_seconds": spread([b for _, b in pairs]),
            "times_as_fast": spread([a / b for a, b in pairs]),
        }
    result |= {
        "settings": vars(arguments),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "CPU",
        "cores": os.cpu_count(),
        "torch": torch.__version__,
    }
    print(json.dumps(result, indent=2))
    save_result(f"decode_{device.type}", result)


if __name__ == "__main__":
    main()
