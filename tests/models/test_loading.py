"""Models and tokenizers from scratch, and errors that name the setting and the remedy."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import random_causal_lm
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, MambaConfig

from pipeline.models.adapters import continue_lora
from pipeline.models.building import build_policy_and_reference
from pipeline.models.loading import (
    LoraSettings,
    ModelError,
    add_lora,
    check_context,
    load_causal_lm,
    load_config,
    load_tokenizer,
)
from pipeline.models.policy import Policy, Reference
from pipeline.models.scratch import new_config, new_tokenizer


def test_a_trained_tokenizer_reproduces_text_and_uses_its_vocabulary(tokenizer, reviews):
    text = reviews.texts[3]
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert len(ids) < len(text) / 3  # whole words, not bytes
    assert len(tokenizer) <= 300
    assert tokenizer.decode(tokenizer("Ünseen 💡 words").input_ids) == "Ünseen 💡 words"


def test_a_wordpiece_tokenizer_can_be_trained_too(reviews):
    tokenizer = new_tokenizer("distilbert", reviews.texts, 200)
    assert tokenizer.decode(tokenizer("A great film", add_special_tokens=False).input_ids) == "a great film"


def test_an_architecture_without_a_tokenizer_is_refused():
    for name in ("gpt3", "vit"):
        with pytest.raises(ModelError, match=f"model_type='{name}' has no tokenizer"):
            new_tokenizer(name, ["the best film of the year"], 300)


def test_a_vocabulary_too_small_for_the_alphabet_is_refused():
    with pytest.raises(ModelError, match="does not round-trip"):
        new_tokenizer("gpt2", ["the best film of the year"], 100)


def test_a_new_configuration_takes_overrides_and_the_tokenizers_ids(tokenizer):
    config = new_config("gpt2", "n_layer=3,resid_pdrop=0.5", tokenizer)
    assert (config.n_layer, config.resid_pdrop, config.vocab_size) == (3, 0.5, len(tokenizer))
    assert config.eos_token_id == config.pad_token_id == tokenizer.eos_token_id
    assert new_config("gpt2", None, tokenizer).n_layer == 12


@pytest.mark.parametrize("overrides", ["n_layers_typo=3", "n_layer", "n_layer=three"])
def test_an_override_that_does_not_fit_is_refused_and_named(overrides, tokenizer):
    with pytest.raises(ModelError, match=f"config_overrides='{overrides}'"):
        new_config("gpt2", overrides, tokenizer)


def test_a_saved_model_and_tokenizer_come_back(tiny_lm, tokenizer):
    model = load_causal_lm(tiny_lm)
    assert not model.training and {p.dtype for p in model.parameters()} == {torch.float32}
    tokens = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, random_causal_lm("gpt2", tokenizer)(tokens).logits)
    assert load_tokenizer(tiny_lm)("the film").input_ids == tokenizer("the film").input_ids
    assert load_config(tiny_lm).n_embd == 32


def test_half_precision_weights_are_loaded_as_float32(tmp_path, tokenizer):
    random_causal_lm("gpt2", tokenizer).to(torch.bfloat16).save_pretrained(tmp_path)
    assert {p.dtype for p in load_causal_lm(str(tmp_path)).parameters()} == {torch.float32}


def test_a_missing_pad_token_becomes_eos(tmp_path, tiny_lm):
    bare = AutoTokenizer.from_pretrained(tiny_lm)
    bare.pad_token = None
    bare.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).pad_token_id is None
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.pad_token_id == loaded.eos_token_id


def test_a_tokenizer_without_eos_is_refused(tmp_path, tiny_lm):
    bare = AutoTokenizer.from_pretrained(tiny_lm)
    bare.eos_token = None
    bare.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="has no EOS token"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("load", [load_tokenizer, load_config, load_causal_lm])
def test_a_path_that_cannot_be_opened_is_named_with_the_reason(load, tmp_path):
    for path, reason in (
        (str(tmp_path / "nowhere"), "there is no such folder"),
        ("./nowhere", "there is no such folder"),
        ("nobody/no-model", "the Hub has no such model or cannot be reached"),
        ("no-such-model", "there is no such folder"),
    ):
        with pytest.raises(ModelError, match=reason) as caught:
            load(path)
        assert f"model_path={path!r} cannot be opened" in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("load", [load_tokenizer, load_config, load_causal_lm])
def test_a_folder_without_a_model_is_refused(load, tmp_path):
    with pytest.raises(ModelError, match=r"model_path=.* cannot be opened"):
        load(str(tmp_path))


def test_prompt_and_response_must_fit_the_context(tiny_lm):
    config = load_config(tiny_lm)
    check_context(config, 24, 40)
    with pytest.raises(ModelError, match=r"prompt_max_tokens=24 and response_max_tokens=41 make 65.*context of 64"):
        check_context(config, 24, 41)


def test_lora_target_modules_that_fit_nothing_are_named(tokenizer):
    with pytest.raises(ModelError, match=r"lora_target_modules=\['q_proj'\] does not fit gpt2"):
        add_lora(random_causal_lm("gpt2", tokenizer), LoraSettings(4, 8, ["q_proj"], seed=0))


def test_loras_first_weights_follow_from_the_seed_and_touch_no_gpus_generator(tokenizer, monkeypatch, recwarn):
    def touched(*_arguments):
        raise AssertionError("a GPU's generator")

    config = LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=4, fan_in_fan_out=True)
    expected = random_causal_lm("gpt2", tokenizer)
    torch.manual_seed(5)
    expected = get_peft_model(expected, config)
    base, before = random_causal_lm("gpt2", tokenizer), torch.get_rng_state()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for name in ("manual_seed", "manual_seed_all", "get_rng_state", "set_rng_state"):
        monkeypatch.setattr(torch.cuda, name, touched)
    model = add_lora(base, LoraSettings(2, 4, None, seed=5))
    assert not [told for told in recwarn if "devices" in str(told.message)], "of more GPUs than one"
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))


def test_lora_goes_where_it_is_told(tokenizer):
    model = add_lora(random_causal_lm("llama", tokenizer), LoraSettings(4, 8, ["k_proj"], seed=0))
    adapted = {name.split(".lora_")[0].split(".")[-1] for name, p in model.named_parameters() if p.requires_grad}
    assert adapted == {"k_proj"}


def test_an_adapter_in_the_models_place_is_refused_with_the_remedy(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="is a LoRA adapter; set adapter_path to it"):
        load_config(str(tmp_path))


def test_an_adapter_that_is_not_there_or_does_not_fit_is_named(tiny_lm, tmp_path, tokenizer):
    with pytest.raises(ModelError, match=r"adapter_path='.*none' cannot be opened"):
        continue_lora(load_causal_lm(tiny_lm), str(tmp_path / "none"))
    other = add_lora(random_causal_lm("llama", tokenizer), LoraSettings(4, 8, None, seed=0))
    other.save_pretrained(tmp_path / "llama")
    with pytest.raises(ModelError, match=r"adapter_path=.*llama"):
        continue_lora(load_causal_lm(tiny_lm), str(tmp_path / "llama"))


def spoil(folder, source, name: str, value: float = float("nan")) -> str:
    """A copy of the model at `source` with one number of the weight `name` changed."""
    model = load_causal_lm(source)
    with torch.no_grad():
        model.get_parameter(name).view(-1)[0] = value
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_whose_logits_are_nan_is_named_with_the_weights_that_are(tmp_path, tiny_lm, value):
    path = spoil(tmp_path, tiny_lm, "transformer.h.1.attn.c_attn.weight", value)
    for lora in (None, LoraSettings(4, 8, None, seed=0)):
        with pytest.raises(ModelError, match=r"the policy cannot be used, its logits are NaN") as caught:
            build_policy_and_reference(path, lora=lora, device="cpu")
        assert "weights in transformer.h.1.attn.c_attn" in str(caught.value) and path in str(caught.value)


def test_of_a_policy_and_its_base_the_one_that_is_nan_is_named(tiny_lm):
    model = add_lora(load_causal_lm(tiny_lm), LoraSettings(4, 8, None, seed=0))
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lora_B" in name).fill_(float("nan"))
    with pytest.raises(ModelError, match=r"the policy cannot be used, its logits are NaN .*lora_B"):
        Policy(model)
    base = load_causal_lm(tiny_lm)
    with torch.no_grad():
        base.transformer.wpe.weight[:] = 3e38  # finite, and their sums are not
    with pytest.raises(
        ModelError, match=r"the reference cannot be used, .* its logits are, though its weights are fini"
    ):
        Reference(base)


def test_a_model_without_its_head_is_refused_where_random_weights_would_stand(tmp_path, untied_lm):
    weights = load_file(Path(untied_lm) / "model.safetensors")
    shutil.copytree(untied_lm, tmp_path, dirs_exist_ok=True)
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"is no whole causal LM: its files lack lm_head.weight"):
        load_causal_lm(str(tmp_path))


def test_a_damaged_weights_file_is_refused_by_setting(tmp_path, tiny_lm):
    shutil.copytree(tiny_lm, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 5)
    with pytest.raises(ModelError, match=r"model_path=.* cannot be opened: "):
        load_causal_lm(str(tmp_path))


def test_a_family_that_cannot_be_trained_is_refused_before_its_weights(tmp_path):
    MambaConfig().save_pretrained(tmp_path)  # and no weights at all
    for load in (load_config, load_causal_lm):
        with pytest.raises(
            ModelError, match=rf"model_path='{tmp_path}': mamba cannot be trained here: it has no cache"
        ):
            load(str(tmp_path))


def test_the_tokens_before_every_text_count_in_the_context(tiny_lm):
    config = load_config(tiny_lm)
    check_context(config, 23, 40, 1)
    with pytest.raises(ModelError, match=r"response_max_tokens=40 and the 1 that the tokenizer puts .*make 65"):
        check_context(config, 24, 40, 1)
