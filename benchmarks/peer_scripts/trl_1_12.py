"""TRL 1.12.0's experimental PPOTrainer on the work of `benchmarks.peers`; prints a line of JSON.

Its value model has a second trunk of the policy's size, as in its documentation; it cannot share the policy's.
"""

import itertools
import json
import resource
import sys
import tempfile
import time

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer

work = json.loads(sys.argv[1])
torch.set_num_threads(work["threads"])
torch.manual_seed(0)
config = GPT2Config(pad_token_id=0)
policy, reference = GPT2LMHeadModel(config), GPT2LMHeadModel(config)
reference.load_state_dict(policy.state_dict())
value = GPT2ForSequenceClassification(GPT2Config(pad_token_id=0, num_labels=1))
reward = GPT2ForSequenceClassification(GPT2Config(pad_token_id=0, num_labels=1, n_layer=1, n_embd=16, n_head=1))
words = Tokenizer(WordLevel({f"w{i}": i for i in range(config.vocab_size)}, unk_token="w1"))
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=words, eos_token="w50256", pad_token="w0", unk_token="w1", padding_side="left"
)
steps, stamps = work["steps"] + 1, []


class Clock(TrainerCallback):
    """The time at the end of each step."""

    def on_train_begin(self, *_, **__):
        stamps.append(time.perf_counter())

    def on_step_end(self, *_, **__):
        stamps.append(time.perf_counter())


with tempfile.TemporaryDirectory() as folder:
    prompts = torch.randint(2, config.vocab_size - 1, (work["batch"] * steps, work["prompt"])).tolist()
    minibatches = work["batch"] // work["minibatch"]
    trainer = PPOTrainer(
        PPOConfig(
            output_dir=folder,
            per_device_train_batch_size=work["minibatch"],
            gradient_accumulation_steps=minibatches,
            num_mini_batches=minibatches,
            num_ppo_epochs=work["epochs"],
            local_rollout_forward_batch_size=work["batch"],
            total_episodes=work["batch"] * steps,
            response_length=work["response"],
            num_sample_generations=0,
            learning_rate=1e-6,
            bf16=work["precision"] == "bf16",
            use_cpu=not torch.cuda.is_available(),
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        ),
        tokenizer,
        policy,
        reference,
        reward,
        Dataset.from_dict({"input_ids": prompts}),
        value,
        callbacks=[Clock()],
    )
    trainer.train()
seconds = [after - before for before, after in itertools.pairwise(stamps[1:])]
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
print("RESULT " + json.dumps({"seconds": seconds, "peak_gigabytes": peak}))
