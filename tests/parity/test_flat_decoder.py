"""FlatDecoder computes what transformers computes for GLM and Llama."""

from __future__ import annotations

import pytest
import torch
from transformers import GlmConfig, GlmForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from models.networks.flat_decoder import FlatDecoder, can_flatten
from models.store.progress import no_progress
from tests.reference_attention import ReferenceAttention, forward, greedy

SIZES = {"vocab_size": 120, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}


def glm(**changes: object) -> GlmForCausalLM:
    config = GlmConfig(
        **SIZES,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=24,
        attention_bias=True,
        rms_norm_eps=1e-3,
        pad_token_id=0,
    )
    for name, value in changes.items():
        setattr(config, name, value)
    return _spread(GlmForCausalLM(config))


def llama(**changes: object) -> LlamaForCausalLM:
    config = LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=4, pad_token_id=0, eos_token_id=None)
    for name, value in changes.items():
        setattr(config, name, value)
    return _spread(LlamaForCausalLM(config))


def _spread(model: PreTrainedModel) -> PreTrainedModel:
    """Give biases and norms other values than the neutral ones of a new model."""
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        spread = 0.3 if parameter.ndim == 1 else 0.1
        parameter.data.add_(torch.randn(parameter.shape, generator=generator) * spread)
    return model.eval()


ROPES = {
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0, "partial_rotary_factor": 0.5},
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16},
    "base": {"rope_type": "default", "rope_theta": 500000.0, "partial_rotary_factor": 0.5},
}
MODELS = {
    "glm": glm,
    "glm 32k, divided": lambda: glm(rope_parameters=ROPES["linear"]),
    "glm 32k, base": lambda: glm(rope_parameters=ROPES["base"]),
    "glm, YaRN": lambda: glm(rope_parameters=ROPES["yarn"] | {"partial_rotary_factor": 0.5}),
    "llama": llama,
    "llama, YaRN": lambda: llama(rope_parameters=ROPES["yarn"]),
    "llama, tied and biased": lambda: llama(attention_bias=True, tie_word_embeddings=True),
}


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_greedy_tokens_are_transformers(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]()
    assert can_flatten(model)
    prompts = [torch.randint(3, 120, (length,)).tolist() for length in (1, 17, 60)]
    with torch.inference_mode():
        expected = [model(torch.tensor([ids])).logits[0, -1] for ids in prompts]
        answers = [
            model.generate(torch.tensor([ids]), max_new_tokens=24, min_new_tokens=24, do_sample=False)[0, len(ids) :]
            for ids in prompts
        ]
    flat = FlatDecoder(model, "float32", 120, 4096, no_progress)
    with torch.inference_mode():
        got = forward(flat, ReferenceAttention(), {i: (ids, 0, flat.layout(ids)) for i, ids in enumerate(prompts)})
        for i, logits in enumerate(expected):
            assert (got[i] - logits).abs().max() < 1e-4 * logits.abs().max()
        assert greedy(flat, prompts, 24) == [answer.tolist() for answer in answers]


def test_other_networks_are_left_to_transformers() -> None:
    assert not can_flatten(glm(hidden_act="gelu"))
    assert not can_flatten(llama(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}))
