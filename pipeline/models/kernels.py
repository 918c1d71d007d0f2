"""What a device computes faster than a model's own modules do: the same formulas, equal to rounding.

On a CPU PyTorch gives float32 products to MKL. On AMD's processors that takes up to twice oneDNN's time where rows are
few, and about the same where they are many, as in the update.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.activations import GELUTanh, NewGELUActivation
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.pytorch_utils import Conv1D

CPU_ATTENTION = "cpu_products"
LONGEST_BY_PRODUCTS = 1024  # keys; beyond it the scores of all pairs take too much memory


def use_fast_kernels(model: nn.Module, device: torch.device | str) -> nn.Module:
    """Give a loaded transformers model, in place, the fused activation and on a CPU its attention; returns it."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is NewGELUActivation:  # seven passes over the activations, all kept for backward
                setattr(module, name, GELUTanh())
    if torch.device(device).type == "cpu" and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(CPU_ATTENTION)
    return model


def cpu_attention(
    module: nn.Module,
    query: Tensor,  # (B, heads, T, D)
    key: Tensor,  # (B, key heads, L, D)
    value: Tensor,
    attention_mask: Tensor | None,  # bool, broadcastable to (B, heads, T, L)
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Attention by two matrix products, where a CPU's fused kernel is slower: in bfloat16, and for a single query."""
    keys = key.shape[2]
    slower = query.dtype == torch.float32 and query.shape[2] > 1
    maskable = query.shape[2] == 1 if attention_mask is None else attention_mask.dtype == torch.bool
    plain = not dropout and kwargs.get("position_bias") is None and maskable
    if slower or not plain or keys > LONGEST_BY_PRODUCTS:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = torch.matmul(query * scaling, key.transpose(2, 3)).float()
    if attention_mask is not None:
        scores = torch.where(attention_mask, scores, torch.finfo(torch.float32).min)
    weights = scores.softmax(-1).to(value.dtype)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), None


AttentionInterface.register(CPU_ATTENTION, cpu_attention)
AttentionMaskInterface.register(CPU_ATTENTION, sdpa_mask)


@contextmanager
def many_forwards(model: nn.Module, *, few_rows: bool = True, keep: bool = False) -> Iterator[None]:
    """A context for forwards without gradient over weights that do not change meanwhile.

    Where autocast lowers the precision, the weights are converted once. On a CPU the matrix products go to oneDNN,
    which is up to twice as fast as the default with few rows, and has the lowered weights laid out for it.

    Args:
        few_rows: each forward has so few that laying lowered weights out first pays.
        keep: on CUDA, leave the lowered weights where they are for the next time, as a captured graph needs them.
    """
    device = next(model.parameters()).device.type
    lowered = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    changed = []
    try:
        on_cpu = device == "cpu" and torch.backends.mkldnn.is_available()
        if (on_cpu or device == "cuda") and (few_rows if lowered is not None else on_cpu):
            product = _cpu_product if on_cpu else _cuda_product
            for module in model.modules():
                # Routers of some mixtures of experts are linear layers that do more.
                if type(module).forward not in (nn.Linear.forward, Conv1D.forward):
                    continue
                if module.weight.dtype != torch.float32:
                    continue
                if module.weight.numel():  # a sharded model's weights are elsewhere
                    module.forward = product(module, lowered, keep)
                    changed.append(module)
        yield
    finally:
        for module in changed:
            del module.forward


def _cpu_product(module: nn.Module, lowered: torch.dtype | None, _keep: bool) -> Callable[[Tensor], Tensor]:
    weight = module.weight.detach()
    weight = weight.t() if isinstance(module, Conv1D) else weight  # (out, in)
    bias = None if module.bias is None else module.bias.detach()
    if lowered is None:
        return lambda x: cpu_product(x, weight, bias)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.to(lowered).contiguous(), None)
    bias = None if bias is None else bias.to(lowered)
    return lambda x: cpu_product(x.to(lowered), packed, bias)


def cpu_product(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """rows (…, I) x weight (O, I)^T + bias (O,) by oneDNN, without gradient; weights may be transposed views."""
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")


# By type: a graph captured in one precision still reads its copies after a use of the model in another.
_KEPT: WeakKeyDictionary[nn.Module, dict[torch.dtype, tuple[Tensor, Tensor | None]]] = WeakKeyDictionary()


def _cuda_product(module: nn.Module, lowered: torch.dtype, keep: bool) -> Callable[[Tensor], Tensor]:
    weight, bias = module.weight.detach(), None if module.bias is None else module.bias.detach()
    kept = _KEPT.get(module, {}).get(lowered)
    if kept is not None:
        kept[0].copy_(weight)
        if bias is not None:
            kept[1].copy_(bias)
        weight, bias = kept
    else:
        weight, bias = weight.to(lowered), None if bias is None else bias.to(lowered)
        if keep:
            _KEPT.setdefault(module, {})[lowered] = weight, bias
    weight = weight.t() if isinstance(module, Conv1D) else weight
    return lambda x: nn.functional.linear(x.to(lowered), weight, bias)
