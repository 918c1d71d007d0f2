"""How many sequences a forward without gradient holds: as many as memory allows, where a recipe does not say."""

from transformers import PreTrainedConfig

LARGEST_ON_CPU = 128  # sequences; more are no faster there
SHARE_OF_FREE_MEMORY = 0.5  # the rest is for what the estimate does not know of
STATES_A_LAYER = 24  # hidden-sized tensors alive at once in a block, its widened ones and float32 copies included


def bytes_per_sequence(config: PreTrainedConfig, tokens: int, itemsize: int, *, graphs: bool = False) -> int:
    """What one sequence of `tokens` needs while it is sampled or read, in bytes: cache, logits, a block's states.

    Args:
        config: of the causal LM.
        tokens: prompt and response together.
        itemsize: bytes of a number in the forward's precision.
        graphs: whether sampling captures CUDA graphs. Each keeps its cache and the logits of its step for itself, and
            the last forward of a batch, with fewer sequences, has another one.
    """
    config = config.get_text_config()
    heads = config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    cache = 2 * config.num_hidden_layers * key_heads * head_size * tokens * itemsize
    logits = config.vocab_size * (itemsize + 3 * 4)  # and three float32 tensors of the sampling
    states = STATES_A_LAYER * config.hidden_size * tokens * itemsize
    return (2 if graphs else 1) * (cache + logits) + (logits if graphs else 0) + states


def largest_microbatch(
    config: PreTrainedConfig,
    samples: int,
    tokens: int,
    *,
    free_bytes: float,
    itemsize: int,
    on_cpu: bool,
    graphs: bool = False,
) -> int:
    """Sequences a forward, from 1 to `samples`, so that all samples go in as few parts of one size as memory allows.

    Args:
        config, tokens, itemsize, graphs: see `bytes_per_sequence`.
        samples: this worker's share of the rollout batch.
        free_bytes: memory that nothing else will take.
    """
    limit = int(SHARE_OF_FREE_MEMORY * free_bytes // bytes_per_sequence(config, tokens, itemsize, graphs=graphs))
    if on_cpu:
        limit = min(limit, LARGEST_ON_CPU)
    parts = -(-samples // max(1, limit))
    return -(-samples // parts)
