"""Reading any causal LM at the response tokens: how its parts are reached, and what a forward of samples gives."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from pipeline.models.kernels import CPU_ATTENTION
from pipeline.models.loading import ModelError
from pipeline.models.packing import Layout, Packed


def position_ids(mask: Tensor) -> Tensor:
    """Positions (B, T) that count real tokens only, so that left padding shifts nothing."""
    return (mask.long().cumsum(1) - 1).clamp_min(0)


def accepts(model: nn.Module, argument: str) -> bool:
    """Whether the causal LM's forward takes `argument` (not every architecture has position ids)."""
    return argument in inspect.signature(causal_lm(model).forward).parameters


def causal_lm(model: nn.Module) -> nn.Module:
    """The transformers model itself, inside PEFT's wrapper or not."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def adapter_state(model: nn.Module) -> tuple[object, ...]:
    """Which LoRA adapters a forward goes through; empty for a model without."""
    layers = (m for m in model.modules() if isinstance(m, BaseTunerLayer)) if hasattr(model, "peft_config") else ()
    return next(((not layer.disable_adapters, *layer.active_adapters) for layer in layers), ())


def output_head(model: nn.Module) -> nn.Module:
    """The language-model head."""
    return causal_lm(model).get_output_embeddings()


@contextmanager
def captured_head_input(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect what the language-model head reads: the trunk's last hidden state, final norm included.

    A hook gives it for every architecture, without keeping the other layers' hidden states.
    """
    captured: list[Tensor] = []
    handle = output_head(model).register_forward_pre_hook(lambda _module, inputs: captured.append(inputs[0]))
    try:
        yield captured
    finally:
        handle.remove()


def trunk_of(lm: nn.Module) -> nn.Module:
    """The causal LM without its head."""
    return lm.model if lm.base_model is lm else lm.base_model  # Llama 4 names another part as its base


@torch.no_grad()
def layout_of(model: nn.Module, who: str = "the model") -> Layout:
    """Find out how `model` may be read by trying: two short samples, alone and in one row.

    Raises:
        ModelError: its logits are NaN or infinite, or it gives other ones in a batch; the message begins with `who`.
    """
    lm = causal_lm(model)
    device, vocabulary = next(lm.parameters()).device, lm.config.get_text_config().vocab_size
    samples = [torch.arange(1, 4, device=device) % vocabulary, torch.arange(4, 9, device=device) % vocabulary]
    alone = torch.cat([lm(input_ids=sample.unsqueeze(0), use_cache=False).logits[0] for sample in samples])
    _require_numbers(lm, alone, who)
    tolerance = 1e-4 if alone.dtype == torch.float32 else 2e-2

    def agrees(logits: Tensor) -> bool:
        return logits.shape == alone.shape and bool((logits - alone).abs().max() <= tolerance * alone.abs().max())

    head = output_head(model)
    states = [_states(trunk_of(lm), input_ids=sample.unsqueeze(0)) for sample in samples]
    plain_head = head.in_features == states[0].shape[-1] and agrees(torch.cat([head(state)[0] for state in states]))
    end_to_end = False
    if accepts(model, "position_ids"):
        positions = torch.cat([torch.arange(len(sample), device=device) for sample in samples]).unsqueeze(0)
        row = torch.cat(samples).unsqueeze(0)
        end_to_end = agrees(lm(input_ids=row, position_ids=positions, use_cache=False).logits[0])
    return Layout(end_to_end, longest_by_mask(model), plain_head)


def _require_numbers(lm: nn.Module, logits: Tensor, who: str) -> None:
    """Weights are looked at too: fused attention may make numbers of weights that are NaN."""
    weights = lm.named_parameters()
    spoilt = next((name for name, w in weights if not w.sum().isfinite() and not w.isfinite().all()), None)
    if spoilt is None and (logits < torch.inf).all():  # NaN is not; -inf is what some say of tokens they never write
        return
    where = "its logits are, though its weights are finite" if spoilt is None else f"its weights in {spoilt} are"
    raise ModelError(
        f"{who} cannot be used, its logits are NaN or infinite: {where}. Its files are damaged, or the training that "
        f"wrote them had failed: {lm.name_or_path or type(lm).__name__}"
    )


def longest_by_mask(model: nn.Module) -> int:
    """Up to what length a mask of our own, true where a position may be looked at, is all the model needs."""
    config = causal_lm(model).config
    if config._attn_implementation not in ("sdpa", CPU_ATTENTION):
        return 0  # the others want masks of other kinds
    if config.model_type == "bloom" or getattr(config, "alibi", False):
        return 0  # positions are read out of the mask, which must be one of tokens
    return getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None) or 2**31


def _states(trunk: nn.Module, **inputs: Tensor) -> Tensor:
    return trunk(**inputs, use_cache=False).last_hidden_state


def _inputs(model: nn.Module, packed: Packed) -> dict[str, Tensor]:
    inputs = {"input_ids": packed.tokens}
    if packed.attention is not None:
        inputs["attention_mask"] = packed.attention if packed.attention.ndim == 4 else packed.attention.long()
    if accepts(model, "position_ids"):
        inputs["position_ids"] = packed.positions
    return inputs


def response_states(model: nn.Module, packed: Packed, trunk: nn.Module | None = None) -> Tensor:
    """The trunk's hidden states (T, H) at the positions before each response token; `trunk` may be a compiled one."""
    trunk = trunk_of(causal_lm(model)) if trunk is None else trunk
    return _states(trunk, **_inputs(model, packed)).flatten(0, 1)[packed.read]


def response_logits(model: nn.Module, packed: Packed) -> tuple[Tensor, Tensor]:
    """Logits (T, V) and hidden states (T, H), of a model whose head is not all there is between them."""
    with captured_head_input(model) as captured:
        logits = model(**_inputs(model, packed), use_cache=False).logits
    return logits.flatten(0, 1)[packed.read], captured[0].flatten(0, 1)[packed.read]
