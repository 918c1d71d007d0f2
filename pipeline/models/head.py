"""From hidden states to log-probs and their loss, a chunk of the tokens at a time.

Logits are the largest tensor of all: tokens x vocabulary. They are made, used and dropped chunk by chunk; the loss's
gradient with respect to the hidden states and the head's weight is taken in the same pass, since PPO's policy loss of a
token needs nothing but that token's log-prob. (Liger Kernel does the same for cross entropy: Hsu et al. 2024.)
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from pipeline.models.kernels import cpu_product

CHUNK_BYTES = 2**27  # of float32 logits
READ_BYTES_ON_CPU = 2**25  # where no gradient is wanted: larger tensors come from the system page by page
CACHED_BYTES = 2**22  # of them at once while a CPU works through a chunk

# From log-probs (t,) and where they stand among all T to the loss of each token (t,).
TokenLoss = Callable[[Tensor, slice], Tensor]


def token_logprobs(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature) at `tokens`, in float32: logits (…, V), tokens (…) -> (…)."""
    logits = logits.float() / temperature
    return logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)


@torch.no_grad()
def head_logprobs(
    head: nn.Module, hidden: Tensor, targets: Tensor, temperature: float = 1.0, *, with_entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Log-probs (T,) of `targets` (T,) and, when asked for, the entropy (T,) in nats; both float32.

    Args:
        head: the language-model head, called as a module, so that sharded weights are gathered for it.
        hidden: (T, H).
    """
    logprobs = torch.empty(len(hidden), device=hidden.device)
    entropy = torch.empty_like(logprobs) if with_entropy else None
    at_once = min(CHUNK_BYTES, READ_BYTES_ON_CPU) if hidden.device.type == "cpu" else CHUNK_BYTES
    for chunk in _slices(len(hidden), head.out_features, at_once):
        logits = head(hidden[chunk])
        logprobs[chunk], chunk_entropy = logits_logprobs(logits, targets[chunk], temperature, with_entropy=with_entropy)
        if with_entropy:
            entropy[chunk] = chunk_entropy
    return logprobs, entropy


def logits_logprobs(
    logits: Tensor, targets: Tensor, temperature: float = 1.0, *, with_entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Log-probs and entropy as `head_logprobs`, from logits (T, V) that are there already. No gradient."""
    logprobs = torch.empty(len(logits), device=logits.device)
    entropy = torch.empty_like(logprobs) if with_entropy else None
    for rows in _cached_rows(logits):
        scaled = _scaled(logits[rows], temperature)
        largest = scaled.amax(1)
        powers = (scaled - largest.unsqueeze(1)).exp_()
        total = powers.sum(1)
        normaliser = largest + total.log()
        logprobs[rows] = scaled.gather(1, targets[rows].unsqueeze(1)).squeeze(1) - normaliser
        if with_entropy:
            entropy[rows] = normaliser - powers.mul_(scaled.nan_to_num_(neginf=0.0)).sum(1) / total
    return logprobs, entropy


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    """A float32 copy, divided by the temperature."""
    scaled = logits.to(torch.float32, copy=True)
    return scaled if temperature == 1.0 else scaled.div_(temperature)


def head_loss(
    head: nn.Linear,
    hidden: Tensor,
    targets: Tensor,
    token_loss: TokenLoss,
    temperature: float = 1.0,
    *,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """`scale` times the sum of the tokens' losses, with gradient, and their log-probs (T,), without.

    Nothing of the size T x V outlives the call.

    Args:
        head: its weight (V, H) is used itself.
        hidden: (T, H).
        token_loss: the loss of each token as a function of its log-prob.
        scale: in float16, which has no numbers that small, it is applied after the matrix products.
    """
    return _HeadLoss.apply(hidden, head.weight, head.bias, targets, token_loss, temperature, scale)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, token_loss, temperature, scale):
        device = hidden.device.type
        compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        with torch.autocast(device, enabled=False):
            states, matrix = hidden.to(compute), weight.to(compute)
            hidden_gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
            weight_gradient = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
            bias_gradient = torch.zeros_like(bias) if bias is not None and ctx.needs_input_grad[2] else None
            logprobs = torch.empty(len(hidden), device=hidden.device)
            loss = torch.zeros((), device=hidden.device)
            before, after = (1.0, scale) if compute == torch.float16 else (scale, 1.0)
            for number, chunk in enumerate(_slices(len(hidden), len(weight), CHUNK_BYTES)):
                logits = _product(states[chunk], matrix, None if bias is None else bias.to(compute))
                logprobs[chunk], chunk_loss, gradient = _chunk_loss(
                    logits, targets[chunk], token_loss, chunk.start, temperature, before
                )
                loss += chunk_loss
                if hidden_gradient is not None:
                    hidden_gradient[chunk] = _product(gradient, matrix.T)
                if weight_gradient is not None:
                    _accumulate(weight_gradient, gradient, states[chunk], first=number == 0)
                if bias_gradient is not None:
                    bias_gradient += gradient.sum(0, dtype=torch.float32)
            if after != 1.0:
                for total in (hidden_gradient, weight_gradient, bias_gradient):
                    if total is not None:
                        total.mul_(after)
        ctx.gradients = [hidden_gradient, weight_gradient, bias_gradient]
        ctx.mark_non_differentiable(logprobs)
        return loss * scale, logprobs

    @staticmethod
    def backward(ctx, grad_loss, _grad_logprobs):
        # Given away rather than saved: autograd adds a tied embedding's gradient to a tensor that nobody else holds.
        gradients, ctx.gradients = ctx.gradients, None
        # On CPU one is found out for nothing, and a pass over the weight's gradient saved.
        if grad_loss.device.type != "cpu" or grad_loss.item() != 1.0:
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(grad_loss)
        return *gradients, None, None, None, None


def _chunk_loss(
    logits: Tensor, targets: Tensor, token_loss: TokenLoss, start: int, temperature: float, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs (t,), the sum of their losses, and `scale` times its gradient (t, V) in the logits' type and place."""
    logprobs = torch.empty(len(logits), device=logits.device)
    loss = torch.zeros((), device=logits.device)
    gradient = logits
    for rows in _cached_rows(logits):
        scaled, target = _scaled(logits[rows], temperature), targets[rows].unsqueeze(1)
        scaled -= scaled.amax(1, keepdim=True)
        chosen = scaled.gather(1, target)
        distribution = scaled.exp_()  # a CPU's log_softmax takes several times as long
        total = distribution.sum(1, keepdim=True)
        logprobs[rows] = (chosen - total.log()).squeeze(1)
        with torch.enable_grad():
            leaf = logprobs[rows].clone().requires_grad_()
            row_loss = token_loss(leaf, slice(start + rows.start, start + rows.stop)).sum()
            (slope,) = torch.autograd.grad(row_loss, leaf)
        loss += row_loss.detach()
        # d logprob / d logits = (one at the target - softmax) / temperature
        slope = (slope * (scale / temperature)).unsqueeze(1)
        distribution.mul_(-slope / total).scatter_add_(1, target, slope)
        gradient[rows] = distribution
    return logprobs, loss, gradient


def _product(rows: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    if rows.dtype == torch.float32 and rows.device.type == "cpu" and torch.backends.mkldnn.is_available():
        return cpu_product(rows, matrix, bias)
    return nn.functional.linear(rows, matrix, bias)


def _accumulate(total: Tensor, gradient: Tensor, states: Tensor, *, first: bool) -> None:
    """total (V, H) += gradient (t, V)^T states (t, H); the first call sets it."""
    if gradient.dtype == total.dtype:
        torch.addmm(total, gradient.T, states, beta=0.0 if first else 1.0, out=total)
    elif first:
        total.copy_(gradient.T @ states)
    else:
        total.add_(gradient.T @ states)


def _slices(count: int, vocabulary: int, bytes_at_once: int) -> Iterator[slice]:
    size = max(1, bytes_at_once // (4 * vocabulary))
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def _cached_rows(logits: Tensor) -> Iterator[slice]:
    """Rows a CPU works on at a time, few enough to stay in its cache; a GPU takes all at once."""
    count, vocabulary = logits.shape
    return _slices(count, vocabulary, CACHED_BYTES if logits.device.type == "cpu" else 4 * vocabulary * max(1, count))
