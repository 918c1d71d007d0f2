"""What is saved loads with plain transformers and PEFT and says the same."""

import shutil

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from pipeline.config import RolloutSettings
from pipeline.models.building import build_policy_and_reference, load_tuned
from pipeline.models.loading import LoraSettings, ModelError, load_tokenizer
from pipeline.models.packing import pack
from pipeline.models.policy import Policy
from pipeline.models.saving import forget_policy, load_value_head, save_policy, saved_step

TOKENS = torch.tensor([[3, 4, 5, 6]])
ROLLOUT = RolloutSettings(response_max_tokens=11, temperature=0.8, top_k=5, top_p=0.9, eos_min_tokens=2)


def close(actual, expected):
    """Equal to the rounding of the fused activation, which plain transformers does not use."""
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def trained(tiny_lm, lora) -> Policy:
    """A policy whose trainable weights have moved, as training leaves it."""
    policy, _ = build_policy_and_reference(tiny_lm, lora=lora, device="cpu")
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return policy


@pytest.fixture(scope="module", params=["full", "lora"])
def saved(request, tiny_lm, tmp_path_factory):
    """(kind, policy, the folder it was saved into)."""
    lora = LoraSettings(4, 8, None, seed=0) if request.param == "lora" else None
    policy = trained(tiny_lm, lora)
    folder = tmp_path_factory.mktemp(request.param) / "not" / "there" / "yet"
    save_policy(policy, load_tokenizer(tiny_lm), folder, ROLLOUT, step=7)
    return request.param, policy, folder


@torch.no_grad()
def logits_of(model):
    return model(TOKENS).logits


def test_plain_transformers_gives_the_same_logits(saved, tiny_lm):
    _, policy, folder = saved
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    torch.testing.assert_close(logits_of(loaded), logits_of(policy.model))
    base = AutoModelForCausalLM.from_pretrained(tiny_lm).eval()
    assert (logits_of(loaded) - logits_of(base)).abs().max() > 0.01


def test_peft_gives_the_same_logits_and_only_the_adapter_is_stored(saved, tiny_lm):
    kind, policy, folder = saved
    if kind == "full":
        assert (folder / "model.safetensors").exists() and not (folder / "adapter_config.json").exists()
        return
    assert not (folder / "model.safetensors").exists()
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_lm), folder).eval()
    close(logits_of(loaded), logits_of(policy.model))


def test_the_value_head_reloads(saved, tiny_lm):
    _, policy, folder = saved
    fresh, _ = build_policy_and_reference(tiny_lm, lora=None, device="cpu")
    load_value_head(fresh, folder)
    assert torch.equal(fresh.value_head.weight, policy.value_head.weight)
    assert torch.equal(fresh.value_head.bias, policy.value_head.bias)
    assert (fresh.value_head.weight != 0).any()


def test_generation_settings_and_tokenizer_are_there(saved, tokenizer):
    _, _, folder = saved
    settings = GenerationConfig.from_pretrained(folder)
    assert (settings.do_sample, settings.max_new_tokens, settings.temperature) == (True, 11, 0.8)
    assert (settings.top_k, settings.top_p, settings.min_new_tokens) == (5, 0.9, 2)
    assert settings.eos_token_id == settings.pad_token_id == tokenizer.eos_token_id
    reloaded = AutoTokenizer.from_pretrained(folder)
    text = "the film was great"
    assert reloaded(text).input_ids == tokenizer(text).input_ids
    assert reloaded.pad_token_id == tokenizer.eos_token_id


def test_load_tuned_brings_back_policy_and_reference(saved, tiny_lm):
    kind, policy, folder = saved
    tuned, reference = load_tuned(tiny_lm, folder, use_peft=kind == "lora", device="cpu")
    count, total = TOKENS.shape
    samples = pack(TOKENS, np.array([[total - 3, 3]] * count), 3, policy.layout)
    with torch.no_grad():
        loaded, original = tuned(samples), policy(samples)
    assert torch.equal(loaded.logprobs, original.logprobs) and torch.equal(loaded.values, original.values)
    _, base = build_policy_and_reference(tiny_lm, lora=None, device="cpu")
    assert torch.equal(reference.logprobs(samples), base.logprobs(samples))
    assert not tuned.training


def test_the_step_is_kept_with_the_model_and_both_go_together(saved, tmp_path):
    _, _, folder = saved
    assert saved_step(folder) == 7 and saved_step(tmp_path) is None
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    forget_policy(copy)
    assert {file.name for file in folder.iterdir()} - {file.name for file in copy.iterdir()} in (
        {"model.safetensors", "value_head.safetensors"},
        {"adapter_model.safetensors", "value_head.safetensors"},
    )


def test_load_tuned_refuses_a_folder_without_a_finished_run(tiny_lm, tmp_path):
    with pytest.raises(ModelError, match=r"holds no trained model \(no value_head.safetensors\)"):
        load_tuned(tiny_lm, tmp_path, use_peft=False, device="cpu")


def test_a_run_that_started_from_an_adapter_saves_the_trained_one_alone(tiny_lm, tmp_path, tokenizer):
    first = trained(tiny_lm, LoraSettings(4, 8, None, seed=0))
    save_policy(first, tokenizer, tmp_path / "first", ROLLOUT, step=1)
    policy, _ = build_policy_and_reference(
        tiny_lm, lora=LoraSettings(4, 8, None, seed=0), adapter_path=str(tmp_path / "first"), device="cpu"
    )
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    save_policy(policy, tokenizer, tmp_path / "second", ROLLOUT, step=2)
    assert not (tmp_path / "second" / "reference").exists()
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_lm), tmp_path / "second").eval()
    close(logits_of(loaded), logits_of(policy.model))
    tuned, reference = load_tuned(
        tiny_lm, tmp_path / "second", use_peft=True, adapter_path=str(tmp_path / "first"), device="cpu"
    )
    close(logits_of(tuned.model), logits_of(policy.model))
    with reference.activated() as original:
        close(logits_of(original), logits_of(first.model))
