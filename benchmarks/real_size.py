"""A GPT-2 of the real size for benchmarks: 124 M random weights, which cost the time and memory of trained ones."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

ROOT = Path(__file__).resolve().parents[1]
PARAMETERS = 124_439_808


def save_gpt2(folder: Path) -> Path:
    """Write the model with the shipped tokenizer into `folder`; returns it."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "assets/gpt2-imdb-mini")
    tokenizer.save_pretrained(folder)
    config = GPT2Config(eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.eos_token_id)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder
