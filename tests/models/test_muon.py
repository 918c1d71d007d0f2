"""Muon beside AdamW behind one optimizer."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, TrainingArguments

from pipeline.models.muon import MuonWithAdamW


@pytest.fixture
def settings(tmp_path):
    return TrainingArguments(
        output_dir=str(tmp_path), learning_rate=1e-2, weight_decay=0.1, use_cpu=True, report_to="none"
    )


def small_gpt2():
    torch.manual_seed(0)
    config = AutoConfig.for_model("gpt2", n_layer=2, n_embd=16, n_head=2, n_positions=8, vocab_size=20,
                                  bos_token_id=0, eos_token_id=0)  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def take_steps(model, optimizer, first: int, count: int, scheduler=None) -> None:
    for step in range(first, first + count):
        tokens = torch.arange(step, step + 6).remainder(20).unsqueeze(0)
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_everything_else(settings):
    model = small_gpt2()
    optimizer = MuonWithAdamW(model, settings)
    muon, adamw = ({id(p) for p in group["params"]} for group in optimizer.param_groups)
    names = {name for name, parameter in model.named_parameters() if id(parameter) in muon}
    assert names == {
        f"transformer.h.{i}.{part}.weight"
        for i in range(2)
        for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    assert len(muon) + len(adamw) == len(list(model.parameters()))


def test_a_classifiers_head_is_left_to_adamw(settings):
    config = AutoConfig.for_model("distilbert", n_layers=1, dim=16, hidden_dim=32, n_heads=2, vocab_size=20)
    model = AutoModelForSequenceClassification.from_config(config)
    matrices = {id(p) for p in MuonWithAdamW(model, settings).param_groups[0]["params"]}
    assert (
        id(model.classifier.weight) not in matrices
        and id(model.distilbert.embeddings.word_embeddings.weight) not in matrices
    )
    assert id(model.distilbert.transformer.layer[0].ffn.lin1.weight) in matrices


def test_a_schedule_reaches_both_parts(settings):
    model = small_gpt2()
    optimizer = MuonWithAdamW(model, settings)
    before = copy.deepcopy(model.state_dict())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step == 0))
    take_steps(model, optimizer, 0, 1, scheduler)
    after_one = copy.deepcopy(model.state_dict())
    take_steps(model, optimizer, 1, 2, scheduler)  # a learning rate of zero
    for name in ("transformer.wte.weight", "transformer.h.0.attn.c_attn.weight"):
        assert not torch.equal(before[name], after_one[name])
        assert torch.equal(after_one[name], model.state_dict()[name])


def test_restored_state_continues_exactly(settings):
    model = small_gpt2()
    optimizer = MuonWithAdamW(model, settings)
    take_steps(model, optimizer, 0, 3)
    saved = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    take_steps(model, optimizer, 3, 3)
    again = small_gpt2()
    restored = MuonWithAdamW(again, settings)
    again.load_state_dict(saved[0])
    restored.load_state_dict(saved[1])
    scheduler = torch.optim.lr_scheduler.LambdaLR(restored, lambda step: float(step < 3))
    take_steps(again, restored, 3, 5, scheduler)  # the last two have a learning rate of zero
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
