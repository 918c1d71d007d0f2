"""The policy with its value head, and the frozen reference it must stay close to."""

from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from pipeline.models.economy import compiled_trunk, enable_recomputation, recomputing
from pipeline.models.forward import causal_lm, layout_of, output_head, response_logits, response_states
from pipeline.models.head import TokenLoss, head_logprobs, head_loss, logits_logprobs, token_logprobs
from pipeline.models.kernels import many_forwards
from pipeline.models.loading import REFERENCE_ADAPTER, ModelError
from pipeline.models.packing import Packed
from pipeline.runtime.engine import gathered, shard_frozen


class ResponseOutputs(NamedTuple):  # not a dataclass: engines look for the tensors in it
    """What one forward says about the T response tokens given, sample by sample; float32."""

    logprobs: Tensor  # (T,) without gradient
    values: Tensor  # (T,)
    entropy: Tensor | None  # (T,), when asked for
    loss: Tensor | None  # () where a loss was asked for: the scaled sum of the tokens', with gradient


class Policy(nn.Module):
    """A causal LM with a linear value head on the shared trunk: one module, one engine.

    The value head is in float32 and starts at zero, so that the first advantages are the rewards' own.
    """

    def __init__(self, model: nn.Module, who: str = "the policy"):
        """Raises `ModelError`, which begins with `who`, as `layout_of` does."""
        super().__init__()
        self.model = model
        self.config = model.config  # DeepSpeed's automatic settings read it from the engine's module
        self._no_split_modules = causal_lm(model)._no_split_modules  # FSDP shards block by block
        self.layout = layout_of(model, who)
        hidden_size = output_head(model).in_features
        self.value_head = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        self.repeatable = True  # whether its gradients can be the same bits each time, see `runtime/determinism.py`
        self._compiled: list[nn.Module] = []  # in a list, where nobody looks for weights: they are the model's own

    def recompute(self) -> None:
        """From now on keep of each block its input only and compute the rest again for the gradient.

        Raises:
            ModelError: see `enable_recomputation`.
        """
        enable_recomputation(causal_lm(self.model))

    def compile_trunk(self) -> None:
        """From now on run compiled blocks in `forward`; sampling, which goes around it, does not.

        Raises:
            ModelError: the trunk's states are not all that the logits are made of.
        """
        if not self.layout.plain_head:
            name = type(causal_lm(self.model)).__name__
            raise ModelError(f"torch_compile=True: the head of {name} is not a plain one; leave it false.")
        self._compiled = [compiled_trunk(causal_lm(self.model))]

    def forward(
        self,
        packed: Packed,
        temperature: float = 1.0,
        *,
        with_entropy: bool = False,
        token_loss: TokenLoss | None = None,
        scale: float = 1.0,
    ) -> ResponseOutputs:
        """Log-probs and values read at the positions before each response token; `head_loss` has the last two."""
        head, entropy, loss = output_head(self.model), None, None
        with nullcontext() if token_loss is None else recomputing(self.model):
            if self.layout.plain_head:
                hidden, logits = response_states(self.model, packed, *self._compiled), None
            else:
                logits, hidden = response_logits(self.model, packed)
        if token_loss is None:
            logprobs, entropy = _logprobs(head, hidden, logits, packed, temperature, with_entropy=with_entropy)
        elif logits is None and isinstance(head, nn.Linear):
            loss, logprobs = head_loss(head, hidden, packed.targets, token_loss, temperature, scale=scale)
        else:  # slower and larger, and right for any head
            logprobs = token_logprobs(head(hidden) if logits is None else logits, packed.targets, temperature)
            loss, logprobs = token_loss(logprobs, slice(0, len(logprobs))).sum() * scale, logprobs.detach()
        with torch.autocast(hidden.device.type, enabled=False):
            values = self.value_head(hidden.to(self.value_head.weight.dtype)).squeeze(-1).float()
            values = values.clone()  # what FSDP2 hangs its backward on must not be a view
        return ResponseOutputs(logprobs, values, entropy, loss)


def _logprobs(
    head: nn.Module,
    hidden: Tensor,
    logits: Tensor | None,
    packed: Packed,
    temperature: float,
    *,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    if logits is None:
        return head_logprobs(head, hidden, packed.targets, temperature, with_entropy=with_entropy)
    return logits_logprobs(logits.detach(), packed.targets, temperature, with_entropy=with_entropy)


class Reference:
    """The model before training, frozen: a copy of its own, or a LoRA policy with the adapter off.

    Where training started from an adapter, that one stays in the reference: the policy's model holds it a second time.
    """

    def __init__(self, model: nn.Module):
        """
        Args:
            model: a frozen causal LM; or the policy's PEFT model, which is the reference too and nothing is copied.
        """
        self._model = model
        self.is_shared = hasattr(model, "disable_adapter")
        self._engine: nn.Module | None = None
        with self.activated():
            self.layout = layout_of(model, "the reference")

    def shard(self, accelerator: Accelerator) -> None:
        """Share the weights out over the workers; raises `EngineError` without ZeRO-3."""
        self._engine = shard_frozen(accelerator, self._model)

    def activated(self) -> AbstractContextManager[nn.Module]:
        """A context in which the model it gives is the reference, whole, to sample from."""
        if not self.is_shared:
            return self._whole()
        return self._first_adapter() if REFERENCE_ADAPTER in self._model.peft_config else self._adapter_off()

    @contextmanager
    def _first_adapter(self):
        before = self._model.active_adapter
        self._model.set_adapter(REFERENCE_ADAPTER)
        try:
            yield self._model
        finally:
            self._model.set_adapter(before)

    @contextmanager
    def _adapter_off(self):
        with self._model.disable_adapter():
            yield self._model

    @contextmanager
    def _whole(self):
        with gathered(self._engine) if self._engine is not None else nullcontext():
            yield self._model

    @torch.no_grad()
    def logprobs(self, packed: Packed, temperature: float = 1.0) -> Tensor:
        """Log-probs (T,) of the response tokens under the reference."""
        # A sharded reference gathers its layers one by one here: it need never stand whole beside a gathered policy.
        active = nullcontext(self._model) if self._engine is not None else self.activated()
        with active as model, many_forwards(model, few_rows=False):
            if self.layout.plain_head:
                hidden, logits = response_states(model, packed), None
            else:
                logits, hidden = response_logits(model, packed)
            return _logprobs(output_head(model), hidden, logits, packed, temperature)[0]
