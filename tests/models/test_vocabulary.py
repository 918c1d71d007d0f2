"""All tokens that end a response do, and are saved; a tokenizer larger than the embedding is refused."""

import pytest
import torch
from conftest import random_causal_lm
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from pipeline.config import RolloutSettings
from pipeline.models.building import build_policy_and_reference
from pipeline.models.loading import LoraSettings, ModelError
from pipeline.models.saving import save_policy
from pipeline.models.vocabulary import eos_token_ids, load_config_and_tokenizer
from pipeline.rollout.decoding import decode
from pipeline.rollout.rollout import Responses, response_texts
from pipeline.rollout.sampling import SamplingOptions, goes_on


def stating(tokenizer, *, generation, config):
    """A tiny model whose generation settings and configuration state these ids."""
    model = random_causal_lm("llama", tokenizer)
    model.generation_config.eos_token_id, model.config.eos_token_id = generation, config
    return model


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        (None, None, (0,)),
        (0, 0, (0,)),
        ([7, 0], 0, (7, 0)),
        (7, [8, 9], (7, 0, 8, 9)),
        (None, 50256, (0,)),  # a default that the vocabulary does not reach
    ],
)
def test_the_ids_of_generation_settings_tokenizer_and_configuration_all_end_a_response(
    tokenizer, generation, config, expected
):
    assert eos_token_ids(stating(tokenizer, generation=generation, config=config), tokenizer) == expected


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("stated, saved", [([7, 0], [7, 0]), (0, 0), (7, [7, 0])])
def test_the_saved_generation_settings_state_them_as_they_did_and_the_rest_is_untouched(
    kind, stated, saved, tokenizer, tmp_path
):
    model = stating(tokenizer, generation=stated, config=0)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    lora = LoraSettings(4, 8, None, seed=0) if kind == "lora" else None
    policy, _ = build_policy_and_reference(str(tmp_path / "model"), lora=lora, device="cpu")
    save_policy(policy, tokenizer, tmp_path / "run", RolloutSettings(), step=1)
    assert GenerationConfig.from_pretrained(tmp_path / "run").eos_token_id == saved
    assert AutoTokenizer.from_pretrained(tmp_path / "run").eos_token_id == 0
    if kind == "full":
        assert AutoConfig.from_pretrained(tmp_path / "run").eos_token_id == 0
    assert set(eos_token_ids(policy.model, tokenizer)) == {0, *([stated] if isinstance(stated, int) else stated)}


def test_any_of_several_ids_ends_a_response_and_none_comes_before_the_least_length(tokenizer):
    model = random_causal_lm("gpt2", tokenizer)
    prompts, ones = torch.tensor([[5, 6]] * 40), torch.ones(40, 2, dtype=torch.bool)
    uniforms = torch.rand(40, 12, generator=torch.Generator().manual_seed(0))
    lengths, ends = torch.full((40,), 12), (20, 30, 40)
    with torch.no_grad():
        model.lm_head.weight[list(ends)] *= 3  # often

    def sampled(eos, **options):
        return decode(model, prompts, ones, uniforms, lengths, eos_token_id=eos, pad_token_id=0,
                      options=SamplingOptions(**options))  # fmt: skip

    several = sampled(ends)
    last = several.tokens.gather(1, several.mask.sum(1, keepdim=True) - 1).squeeze(1)
    early = several.mask.sum(1) < 12
    assert set(last[early].tolist()) == set(ends)  # each of them ended one, and nothing else did
    for row, mask in zip(several.tokens, several.mask, strict=True):
        assert not set(row[mask][:-1].tolist()) & set(ends)
    one, as_tuple = sampled(20), sampled((20,))
    assert torch.equal(one.tokens, as_tuple.tokens) and torch.equal(one.mask, as_tuple.mask)
    assert (sampled(ends, min_tokens=5).mask.sum(1) > 5).all()
    assert goes_on(torch.tensor([20, 21, 40]), ends).tolist() == [False, True, False]


def test_a_tokenizer_larger_than_the_embedding_is_refused_with_both_sizes(tmp_path, tiny_lm, bos_tokenizer):
    AutoConfig.from_pretrained(tiny_lm).save_pretrained(tmp_path)
    bos_tokenizer.save_pretrained(tmp_path)
    size = AutoConfig.from_pretrained(tiny_lm).vocab_size
    with pytest.raises(ModelError, match=rf"ids up to {size + 1}, so {size + 2} tokens, and its embedding {size}"):
        load_config_and_tokenizer(str(tmp_path))


def test_a_token_that_the_tokenizer_does_not_have_is_no_text(tokenizer):
    ids, ones = torch.tensor([[5, len(tokenizer) + 3, 6]]), torch.ones(1, 3, dtype=torch.bool)
    text = response_texts(
        Responses(ids[:, :1], ones[:, :1], ids[:, 1:], ones[:, 1:]), [tokenizer.decode([5])], tokenizer
    )
    assert text == [tokenizer.decode([6])]
