"""Muon for the matrices inside a network and AdamW for the rest, behind the interface of one optimizer."""

import torch
from torch import nn
from transformers import PreTrainedModel, TrainingArguments
from transformers.pytorch_utils import Conv1D


class MuonWithAdamW(torch.optim.Optimizer):
    """Trains small models from scratch in fewer steps than AdamW alone.

    Muon (Jordan et al. 2024) takes the weights of linear layers below the head, with steps as large as AdamW's
    (Liu et al. 2025, "Muon is scalable for LLM training"), so that one learning rate serves both; AdamW takes
    embeddings, head, norms and biases, without weight decay.
    """

    def __init__(self, model: PreTrainedModel, settings: TrainingArguments):
        linear = [module for module in model.base_model.modules() if isinstance(module, (nn.Linear, Conv1D))]
        matrices = [module.weight for module in linear if module.weight.requires_grad]
        taken = {id(parameter) for parameter in matrices}
        others = [p for p in model.parameters() if p.requires_grad and id(p) not in taken]
        self._parts = (
            torch.optim.Muon(
                matrices,
                lr=settings.learning_rate,
                weight_decay=settings.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            ),
            torch.optim.AdamW(
                others,
                lr=settings.learning_rate,
                betas=(settings.adam_beta1, settings.adam_beta2),
                eps=settings.adam_epsilon,
                weight_decay=0.0,
                fused=True,
            ),
        )
        super().__init__([group for part in self._parts for group in part.param_groups], {})
        for part, groups in zip(self._parts, (self.param_groups[:1], self.param_groups[1:]), strict=True):
            part.param_groups = groups  # the same dicts, so that a scheduler's learning rates arrive

    def step(self, closure=None):
        loss = None if closure is None else closure()
        for part in self._parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, object]:
        return {"parts": [part.state_dict() for part in self._parts]}

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        for part, state in zip(self._parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self._parts for group in part.param_groups]
