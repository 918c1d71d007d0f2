"""Which families of causal LMs cannot be trained here, from a model's configuration alone.

What is not refused here is tried once its weights are there (`layout_of`, `check_sampling`), and refused by name where
sampling or a forward over a batch says something else than the plain model. docs/models.md has the list of both.
"""

import inspect

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig

ENCODERS = (
    "bert",
    "bert-generation",
    "big_bird",
    "electra",
    "ernie",
    "megatron-bert",
    "rembert",
    "roc_bert",
    "roformer",
)
POSITIONS = "counts positions from its padding token's id on, which batches with left padding do not"
OWN_STATE = "keeps what it has read in a cache of its own, which decoding here cannot fill"
NO_TEXT = "continues something else than text alone"
REFUSED = {
    **dict.fromkeys(("roberta", "roberta-prelayernorm", "camembert", "data2vec-text"), POSITIONS),
    **dict.fromkeys(("xlm-roberta", "xlm-roberta-xl", "xmod"), POSITIONS),
    "trocr": "is the decoder of an encoder-decoder model, which counts positions by its cache",
    "minimax": OWN_STATE,
    "cpmant": OWN_STATE,
    "moshi": "samples otherwise than it reads beyond its sliding window",
    **dict.fromkeys(("blt", "git", "phi4_multimodal", "gemma4_assistant"), NO_TEXT),
}


def refusal(config: PreTrainedConfig) -> str | None:
    """Why no model of this configuration can be trained here, as the end of a sentence; None where nothing is known."""
    if config.model_type in REFUSED:
        return REFUSED[config.model_type]
    if getattr(config, "is_encoder_decoder", False):
        return "has an encoder, which must be given a text of its own"
    if config.get_text_config() is not config:
        return "reads images or sounds as well, and only models of text alone are trained; use its text model"
    if config.model_type in ENCODERS and not config.is_decoder:
        return "looks at later tokens too (is_decoder is false)"
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return "is no causal language model"
    taken = inspect.signature(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].forward).parameters
    if not {"attention_mask", "past_key_values"} <= set(taken):
        return "has no cache of keys and values, by which decoding here goes on from a padded prompt"
    return None
