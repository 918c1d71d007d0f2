"""An adapter's file is loaded whole or refused, naming what is missing, misplaced or of another shape."""

import json

import pytest
import torch
from conftest import random_causal_lm
from safetensors.torch import load_file, save_file

from pipeline.models.adapters import continue_lora
from pipeline.models.building import load_tuned
from pipeline.models.loading import LoraSettings, ModelError, add_lora, load_causal_lm
from pipeline.models.policy import Policy
from pipeline.models.saving import VALUE_HEAD_FILE

FILE = "adapter_model.safetensors"


def without(part):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name}


def renamed(tensors):
    return {name.replace("lora_A", "lora_first"): tensor for name, tensor in tensors.items()}


def of_rank_two(tensors):
    return {name: tensor[:2] if "lora_A" in name else tensor[:, :2] for name, tensor in tensors.items()}


def deeper(tensors):
    return tensors | {name.replace("h.1.", "h.7."): tensor.clone() for name, tensor in tensors.items()}


FAULTS = {
    "empty": (lambda tensors: {}, r"lacks base_model\.model\.transformer\.h\.0\.attn\.c_attn\.lora_A\.\S+, .*1 more"),
    "without B": (without("lora_B"), r"lacks \S+h\.0\.attn\.c_attn\.lora_B\S+, \S+h\.1\.attn\.c_attn\.lora_B"),
    "without a layer": (without("h.1."), r"lacks \S+h\.1\.attn\.c_attn\.lora_A"),
    "renamed": (renamed, r"lacks \S+lora_A.*no place for \S+lora_first"),
    "another rank": (of_rank_two, r"size mismatch for \S+c_attn\.lora_A\S+ .*\[2, 32\].*\[4, 32\]"),
    "a deeper base": (deeper, r"no place for \S+h\.7\.attn"),
}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, tokenizer):
    """The folder of a saved adapter of the tiny GPT-2, as a run leaves it."""
    folder = tmp_path_factory.mktemp("adapter")
    model = add_lora(random_causal_lm("gpt2", tokenizer), LoraSettings(4, 8, None, seed=0))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    model.save_pretrained(folder)
    head = Policy(model).value_head.state_dict()
    save_file({name: tensor.contiguous() for name, tensor in head.items()}, folder / VALUE_HEAD_FILE)
    return folder


@pytest.fixture
def broken(adapter, tmp_path):
    """A copy of it with a fault in its tensors."""

    def broken(fault):
        for file in adapter.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        tensors = fault(load_file(tmp_path / FILE))
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / FILE)
        return tmp_path

    return broken


def test_a_whole_adapter_is_loaded_twice_as_it_is(adapter, tiny_lm):
    model = continue_lora(load_causal_lm(tiny_lm), str(adapter))
    layer = model.get_base_model().transformer.h[1].attn.c_attn
    saved = load_file(adapter / FILE)["base_model.model.transformer.h.1.attn.c_attn.lora_B.weight"]
    for name in ("default", "reference"):
        assert torch.equal(layer.lora_B[name].weight, saved)
    assert layer.lora_B["default"].weight.requires_grad and not layer.lora_B["reference"].weight.requires_grad


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_adapter_is_refused_in_training_and_as_a_finished_run_with_what_is_wrong(fault, broken, tiny_lm):
    change, message = FAULTS[fault]
    folder = broken(change)
    with pytest.raises(ModelError, match=rf"adapter_path='{folder}' does not fit the model: .*{message}"):
        continue_lora(load_causal_lm(tiny_lm), str(folder))
    with pytest.raises(ModelError, match=rf"the adapter of the run='{folder}' does not fit the model: .*{message}"):
        load_tuned(tiny_lm, folder, use_peft=True, device="cpu")


def test_a_file_that_is_no_adapter_file_is_refused(broken, tiny_lm):
    folder = broken(without("nothing"))
    (folder / FILE).write_bytes(b"\0" * 5)
    with pytest.raises(ModelError, match=rf"adapter_path='{folder}' cannot be opened: "):
        continue_lora(load_causal_lm(tiny_lm), str(folder))


@pytest.mark.parametrize(
    "settings, message", [({"bias": "all"}, "changes the model's biases"), ({"peft_type": "IA3"}, "only LoRA")]
)
def test_an_adapter_of_a_kind_that_has_no_reference_or_is_not_lora_is_refused(settings, message, broken, tiny_lm):
    folder = broken(without("nothing"))
    stated = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(stated | settings))
    with pytest.raises(ModelError, match=message):
        continue_lora(load_causal_lm(tiny_lm), str(folder))


def test_all_linear_puts_adapters_on_every_linear_layer_but_the_head(tokenizer):
    model = add_lora(random_causal_lm("gpt2", tokenizer), LoraSettings(4, 8, ["all-linear"], seed=0))
    adapted = {name.split(".lora_")[0].split(".")[-2] for name, p in model.named_parameters() if p.requires_grad}
    assert adapted == {"attn", "mlp"}
    assert sum("lora_A" in name for name, _ in model.named_parameters()) == 8  # two in each half of each of two blocks
