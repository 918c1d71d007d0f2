"""CUDA's memory-efficient attention, missing in CPU builds of torch: the same operators, computed on the CPU."""

import torch


def _forward(query, key, value, bias, _logsumexp, _dropout=0.0, is_causal=False, *, scale=None):
    out = _weights(query, key, bias, is_causal, scale) @ value
    logsumexp, seed = query.new_zeros(query.shape[:3], dtype=torch.float32), torch.zeros((), dtype=torch.long)
    return out, logsumexp, seed, seed.clone()


def _backward(
    grad, query, key, value, bias, _out, _logsumexp, _seed, _offset, _dropout, wanted, is_causal=False, *, scale=None
):
    weights = _weights(query, key, bias, is_causal, scale)
    of_weights = grad @ value.transpose(2, 3)
    of_scores = weights * (of_weights - (of_weights * weights).sum(-1, keepdim=True))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    of_query, of_key = of_scores @ key * scale, of_scores.transpose(2, 3) @ query * scale
    return of_query, of_key, weights.transpose(2, 3) @ grad, of_scores if wanted[3] else None


def _weights(query, key, bias, is_causal, scale):
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[2:], dtype=torch.bool).tril(), -torch.inf)
    return (scores if bias is None else scores + bias).softmax(-1)


KERNELS = {
    "_scaled_dot_product_efficient_attention": _forward,
    "_scaled_dot_product_efficient_attention_backward": _backward,
}
