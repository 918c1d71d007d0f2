"""Which families of causal LMs can be trained: sampling, update and reference say what the plain model says."""

import copy
import re
from pathlib import Path

import pytest
import torch
from families import BOS, PAD, TRAINED, VOCABULARY, tiny_config, tiny_family
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from pipeline.data.prompts import PromptBatch
from pipeline.models.families import REFUSED, refusal
from pipeline.models.kernels import use_fast_kernels
from pipeline.models.loading import ModelError, trying
from pipeline.models.packing import pack
from pipeline.models.policy import Policy, Reference
from pipeline.rollout.rollout import policy_outputs, reference_logprobs, sample_responses
from pipeline.rollout.sampling import SamplingOptions
from pipeline.rollout.sizing import bytes_per_sequence
from pipeline.rollout.trial import check_sampling

PROMPTS = ([BOS, 15, 16, 17], [BOS], [30, 31], [20])  # with BOS and without
WIDTH, LENGTH = 4, 6
DOCUMENT = Path(__file__).parents[2] / "docs" / "models.md"
# Refused by a rule of their own, beside those that REFUSED names one by one.
BY_RULE = (
    "bart", "bert", "bert-generation", "big_bird", "bigbird_pegasus", "blenderbot", "blenderbot-small", "dots3_note",
    "electra", "emu3", "ernie", "falcon_mamba", "fuyu", "gemma3", "gemma3n", "gemma4", "gemma4_unified",
    "gemma4_unified_assistant", "got_ocr2", "llama4", "mamba", "mamba2", "marian", "mbart", "megatron-bert", "mllama",
    "moss_transcribe_diarize", "musicgen", "musicgen_melody", "mvp", "openai-gpt", "pegasus", "plbart", "prophetnet",
    "qwen3_5", "qwen3_5_moe", "qwen4_exp", "reformer", "rembert", "roc_bert", "roformer", "rwkv", "whisper", "xlm",
    "xlnet", "xlstm",
)  # fmt: skip
FAMILIES = sorted({name.partition(",")[0] for name in TRAINED})


@pytest.mark.parametrize("name", sorted(TRAINED))
def test_sampling_update_and_reference_say_what_a_plain_forward_of_each_sample_says(name):
    plain = tiny_family(name)
    assert refusal(plain.config) is None
    model = use_fast_kernels(copy.deepcopy(plain), "cpu")
    policy, reference = Policy(model).eval(), Reference(model)
    mask = torch.tensor([[i >= WIDTH - len(prompt) for i in range(WIDTH)] for prompt in PROMPTS])
    tokens = torch.tensor([[PAD] * (WIDTH - len(prompt)) + prompt for prompt in PROMPTS])
    responses, sampled = sample_responses(
        model, PromptBatch(tokens, mask, [""] * 4), torch.rand(4, LENGTH, generator=torch.Generator().manual_seed(0)),
        torch.tensor([6, 3, 5, 6]), microbatch_size=3, eos_token_id=VOCABULARY - 1, pad_token_id=PAD,
        options=SamplingOptions(), value_head=policy.value_head,
    )  # fmt: skip
    packed = pack(responses.tokens, responses.lengths(), LENGTH, policy.layout)
    trained = policy(packed, token_loss=lambda logprobs, _rows: logprobs)
    (trained.loss + trained.values.sum()).backward()
    found = {
        "sampling": sampled.logprobs,
        "a forward over the batch": policy_outputs(policy, responses, temperature=1.0, microbatch_size=4).logprobs,
        "the update's forward": packed.unpack(trained.logprobs),
        "the reference": reference_logprobs(reference, responses, temperature=1.0, microbatch_size=4),
    }
    for i, prompt in enumerate(PROMPTS):
        response = responses.response_tokens[i][responses.response_mask[i]]
        with torch.no_grad():
            logits = plain(input_ids=torch.tensor([prompt + response.tolist()])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, response.unsqueeze(1)).squeeze(1)
        for what, logprobs in found.items():
            torch.testing.assert_close(
                logprobs[i, : len(response)], expected, atol=1e-5, rtol=0, msg=lambda text, at=what: f"{at}: {text}"
            )
    assert bytes_per_sequence(plain.config, 10, 4) > 0
    assert any(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in model.parameters())


def test_at_least_thirty_families_are_trained():
    assert len(FAMILIES) >= 30


@pytest.mark.parametrize("name", [*BY_RULE, *(name for name in REFUSED if name != "gemma4_assistant")])
def test_a_family_that_cannot_be_trained_is_refused_from_its_configuration_alone(name):
    assert refusal(CONFIG_MAPPING[name]())


@pytest.mark.parametrize(
    "name", ["bart", "bert", "cpmant", "mamba", "minimax", "openai-gpt", "roberta", "rwkv", "trocr", "xlnet"]
)
def test_what_is_refused_by_its_name_would_be_found_out_by_trying_too(name):
    model = use_fast_kernels(tiny_family(name), "cpu")
    with pytest.raises(ModelError, match=f"model_path='here': {name} cannot be trained here"):
        with trying(model, "here"):
            policy = Policy(model).eval()
        check_sampling(policy, "here")


def test_a_family_that_is_trained_passes_the_trial():
    for name in ("gpt2", "bloom", "llama4_text", "recurrent_gemma"):
        check_sampling(Policy(use_fast_kernels(tiny_family(name), "cpu")).eval(), "here")


def test_the_document_lists_the_families_as_they_are_found_here():
    parts = re.split(r"^## ", DOCUMENT.read_text(encoding="utf-8"), flags=re.M)
    listed = {
        part.split()[0]: [
            name for name in re.findall(r"`([^`\n]+)`", part) if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        ]
        for part in parts
    }
    assert listed["Checked"] == FAMILIES
    refused = set(BY_RULE) | set(REFUSED)
    assert set(listed["Refused"]) == refused
    assert set(listed["Tried"]) == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - refused - set(FAMILIES)


def test_a_decoder_of_an_encoders_family_is_not_refused():
    assert refusal(tiny_config("bert")) and refusal(tiny_config("bert", is_decoder=True)) is None
