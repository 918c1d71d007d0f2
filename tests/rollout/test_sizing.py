"""How many sequences go in one forward: what memory allows, in parts of one size."""

import pytest
import torch
from conftest import SHAPES, random_causal_lm
from transformers import GPT2Config, StaticCache

from pipeline.assembly import bytes_to_come
from pipeline.rollout.sizing import LARGEST_ON_CPU, bytes_per_sequence, largest_microbatch

GPT2 = GPT2Config()
TOKENS = 32


def size(samples, free, *, on_cpu=False, itemsize=2):
    return largest_microbatch(GPT2, samples, TOKENS, free_bytes=free, itemsize=itemsize, on_cpu=on_cpu)


def test_a_sequence_of_gpt2_by_hand():
    cache, logits, states = 2 * 12 * 768 * 32 * 2, 50257 * (2 + 12), 24 * 768 * 32 * 2
    assert bytes_per_sequence(GPT2, TOKENS, 2) == cache + logits + states


@pytest.mark.parametrize("architecture", SHAPES)
def test_the_cache_that_decoding_makes_is_in_the_estimate(architecture, tokenizer):
    config = random_causal_lm(architecture, tokenizer).config
    cache = StaticCache(config=config, max_cache_len=TOKENS)
    key_heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    head_size = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    cache.early_initialization(1, key_heads, head_size, torch.float32, torch.device("cpu"))
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    without = bytes_per_sequence(config, TOKENS, 4) - config.vocab_size * 16 - 24 * config.hidden_size * TOKENS * 4
    assert without == held


def test_with_room_for_all_of_them_all_go_at_once():
    assert size(512, 1e12) == 512


def test_with_room_for_fewer_the_parts_are_of_one_size():
    room = 2 * bytes_per_sequence(GPT2, TOKENS, 2)
    assert size(512, 300 * room) == 256
    assert size(500, 200 * room) == 167  # three parts


def test_float32_takes_more_and_so_fewer_go():
    room = 2 * bytes_per_sequence(GPT2, TOKENS, 2) * 100
    assert size(100, room, itemsize=4) < size(100, room) == 100


def test_one_goes_however_little_room_there_is():
    assert size(8, 0.0) == 1


def test_a_cpu_takes_no_more_than_it_is_fast_with():
    assert size(512, 1e12, on_cpu=True) == LARGEST_ON_CPU
    assert size(40, 1e12, on_cpu=True) == 40


def test_graphs_keep_memory_of_their_own_and_so_fewer_go():
    cache, logits = 2 * 12 * 768 * 32 * 2, 50257 * (2 + 12)
    plain, graphed = bytes_per_sequence(GPT2, TOKENS, 2), bytes_per_sequence(GPT2, TOKENS, 2, graphs=True)
    assert graphed - plain == cache + 2 * logits
    room = {"free_bytes": 2 * graphed * 100, "itemsize": 2, "on_cpu": False}
    assert largest_microbatch(GPT2, 100, TOKENS, **room, graphs=True) == 100
    assert largest_microbatch(GPT2, 101, TOKENS, **room, graphs=True) == 51
    assert largest_microbatch(GPT2, 101, TOKENS, **room) == 101


@pytest.mark.parametrize(
    ("strategy", "copies", "expected"),
    [
        ("single", False, 12 * 6),  # gradient and Adam's two moments
        ("ddp", False, 16 * 6),  # and the buckets
        ("ddp", True, 16 * 6 + 2 * (6 + 10)),  # and the frozen weights are lowered too
    ],
)
def test_what_training_adds_to_the_weights_is_left_free(strategy, copies, expected):
    policy = torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(4, 2)])
    policy[1].requires_grad_(False)
    assert bytes_to_come(policy, strategy, copies=copies) == expected
