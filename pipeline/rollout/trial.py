"""Trying a loaded model before it is trained: does sampling from padded prompts say what the plain model says?"""

import torch
from torch import Tensor

from pipeline.models.forward import causal_lm
from pipeline.models.head import token_logprobs
from pipeline.models.loading import ModelError, trying
from pipeline.models.policy import Policy
from pipeline.rollout.decoding import decode
from pipeline.rollout.rollout import Responses, policy_outputs
from pipeline.rollout.sampling import SamplingOptions

PROMPTS = ((1, 2, 3), (4,))
LENGTH = 3  # tokens of the responses
TOLERANCE = {torch.float32: 1e-3}  # nats; faults are of .01 and more
LOW_TOLERANCE = 0.2


@torch.no_grad()
def check_sampling(policy: Policy, path: str) -> None:
    """Sample after two short prompts of different lengths, and hold the log-probs against each sample's alone.

    Raises:
        ModelError: they differ: the model does not heed the padding, its cache or its positions as it would have to.
    """
    lm = causal_lm(policy.model)
    with trying(lm, path):
        device, vocabulary = policy.value_head.weight.device, lm.config.get_text_config().vocab_size
        width = max(map(len, PROMPTS))
        mask = torch.tensor([[place >= width - len(p) for place in range(width)] for p in PROMPTS], device=device)
        tokens = torch.zeros(mask.shape, dtype=torch.long, device=device)
        tokens[mask] = torch.tensor(sum(PROMPTS, ()), device=device) % vocabulary
        uniforms = torch.full((len(PROMPTS), LENGTH), 0.5, device=device)
        lengths = torch.full((len(PROMPTS),), LENGTH, device=device)
        decoded = decode(policy.model, tokens, mask, uniforms, lengths, eos_token_id=-1, pad_token_id=0,
                         options=SamplingOptions(), value_head=policy.value_head)  # fmt: skip
        responses = Responses(tokens, mask, decoded.tokens, decoded.mask)
        batch = policy_outputs(policy, responses, temperature=1.0, microbatch_size=len(PROMPTS)).logprobs
        alone = torch.stack([_alone(policy, row[keep], response) for row, keep, response
                             in zip(tokens, mask, decoded.tokens, strict=True)])  # fmt: skip
    tolerance = TOLERANCE.get(next(lm.parameters()).dtype, LOW_TOLERANCE)
    for found, what in ((decoded.logprobs, "sampling from padded prompts"), (batch, "a forward over a batch")):
        off = (found - alone).abs().max().item()
        if not off <= tolerance:
            raise ModelError(
                f"model_path={path!r}: {lm.config.model_type} cannot be trained here: the log-probs of {what} differ "
                f"by up to {off:.2g} nats from those of each text alone. docs/models.md has the families that can."
            )


def _alone(policy: Policy, prompt: Tensor, response: Tensor) -> Tensor:
    """Log-probs of one response by a plain forward, without padding or cache."""
    whole = torch.cat([prompt, response]).unsqueeze(0)
    logits = policy.model(input_ids=whole, use_cache=False).logits[0, len(prompt) - 1 : -1]
    return token_logprobs(logits, response)
