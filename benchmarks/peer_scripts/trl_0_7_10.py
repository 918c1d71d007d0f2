"""TRL 0.7.10's PPOTrainer, value head on the policy's trunk, on the work of `benchmarks.peers`; prints JSON."""

import json
import resource
import sys
import tempfile
import time

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

work = json.loads(sys.argv[1])
torch.set_num_threads(work["threads"])
torch.manual_seed(0)
words = Tokenizer(WordLevel({f"w{i}": i for i in range(50257)}, unk_token="w1"))
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=words, eos_token="w50256", pad_token="w0", unk_token="w1", padding_side="left"
)
with tempfile.TemporaryDirectory() as folder:
    GPT2LMHeadModel(GPT2Config(pad_token_id=0)).save_pretrained(folder)
    model, reference = (AutoModelForCausalLMWithValueHead.from_pretrained(folder) for _ in range(2))
trainer = PPOTrainer(
    PPOConfig(
        batch_size=work["batch"],
        mini_batch_size=work["minibatch"],
        ppo_epochs=work["epochs"],
        learning_rate=1e-6,
        accelerator_kwargs={"cpu": not torch.cuda.is_available(), "mixed_precision": work["precision"]},
    ),
    model,
    reference,
    tokenizer,
)
seconds = []
for _ in range(work["steps"] + 1):
    start = time.perf_counter()
    prompts = list(torch.randint(2, 50000, (work["batch"], work["prompt"])))
    responses = trainer.generate(
        prompts,
        batch_size=work["batch"],
        return_prompt=False,
        do_sample=True,
        top_k=0,
        top_p=1.0,
        min_new_tokens=work["response"],
        max_new_tokens=work["response"],
        pad_token_id=0,
    )
    rewards = [torch.tensor(float(i % 2)) for i in range(work["batch"])]
    trainer.step(prompts, responses, rewards)
    seconds.append(time.perf_counter() - start)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
print("RESULT " + json.dumps({"seconds": seconds[1:], "peak_gigabytes": peak}))
