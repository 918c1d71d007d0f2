"""The policy with its value head, and the frozen reference it must stay close to."""

from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from pipeline.models.forward import causal_lm, response_logits, token_entropy, token_logprobs
from pipeline.models.loading import REFERENCE_ADAPTER
from pipeline.runtime.engine import gathered, shard_frozen


@dataclass(frozen=True)
class ResponseOutputs:
    """What one forward says about the response tokens given; float32, meaningless on padding."""

    logprobs: Tensor  # (B, R)
    values: Tensor  # (B, R)
    entropy: Tensor | None  # (B, R), when asked for


class Policy(nn.Module):
    """A causal LM with a linear value head on the shared trunk: one module, one engine.

    The value head is in float32 and starts at zero, so that the first advantages are the rewards' own.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.config = model.config  # DeepSpeed's automatic settings read it from the engine's module
        self._no_split_modules = causal_lm(model)._no_split_modules  # FSDP shards block by block
        hidden_size = causal_lm(model).get_output_embeddings().in_features
        self.value_head = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    def forward(
        self,
        tokens: Tensor,  # (B, P + R)
        mask: Tensor,  # (B, P + R)
        response_length: int,
        temperature: float = 1.0,
        with_entropy: bool = False,
    ) -> ResponseOutputs:
        """Log-probs and values read at the positions before each response token."""
        logits, hidden = response_logits(self.model, tokens, mask, response_length)
        logprobs = token_logprobs(logits, tokens[:, -response_length:], temperature)
        with torch.autocast(hidden.device.type, enabled=False):
            values = self.value_head(hidden.to(self.value_head.weight.dtype)).squeeze(-1).float()
        return ResponseOutputs(logprobs, values, token_entropy(logits, temperature) if with_entropy else None)


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
    def logprobs(self, tokens: Tensor, mask: Tensor, response_length: int, temperature: float = 1.0) -> Tensor:
        """Log-probs of the response tokens under the reference, (B, R); arguments as in `Policy.forward`."""
        # A sharded reference gathers its layers one by one here: it need never stand whole beside a gathered policy.
        with nullcontext(self._model) if self._engine is not None else self.activated() as model:
            logits, _ = response_logits(model, tokens, mask, response_length)
        return token_logprobs(logits, tokens[:, -response_length:], temperature)
