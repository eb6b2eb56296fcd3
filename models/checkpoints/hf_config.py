"""config.json -> the context length, and a refusal of every value that would change the network and that transformers
does not read: it drops what it does not know without a word."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, cast

from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from models.family import ImportRefused

# Fields that change what some architectures compute, and the values that change nothing.
NEUTRAL: dict[str, tuple[object, ...]] = {
    "alibi": (False,),
    "attention_chunk_size": (),
    "attention_multiplier": (),
    "attn_logit_softcapping": (),
    "clip_qkv": (),
    "dim_model_base": (),
    "dual_chunk_attention_config": (),
    "embedding_multiplier": (1,),
    "final_logit_softcapping": (),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "no_rope_layers": ([],),
    "parallel_attn": (False,),
    "partial_rotary_factor": (1,),
    "qk_layernorm": (False,),
    "query_pre_attn_scalar": (),
    "residual_multiplier": (1,),
    "rope_ratio": (1,),
    "rotary_pct": (1,),
    "scale_depth": (),
    "scale_emb": (1,),
    "sliding_window": (),
    "use_dynamic_ntk": (False,),
    "use_logn_attn": (False,),
    "use_parallel_residual": (False,),
    "use_qk_norm": (False,),
    "use_sliding_window": (False,),
}
NORM_EPSILONS = (
    "rms_norm_eps",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "layernorm_epsilon",
    "norm_eps",
    "norm_epsilon",
)
ADVICE = {
    "rope_ratio": ": multiply rope_theta by it instead (GLM-4 has the base 10000)",
    "dual_chunk_attention_config": ": remove it and set max_position_embeddings to its chunk_size",
}

# Rotary types whose values are checked. Others are left to the engine: the native one refuses what depends on a batch.
ROPE_KEYS = {
    "default": set[str](),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {
        "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
        "mscale_all_dim", "truncate",
    },
}  # fmt: skip
COMMON_ROPE_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned"}


def check_config(raw: Mapping[str, Any], config: PretrainedConfig) -> None:
    """Raise ImportRefused for values of config.json that the network `config` would not honour.

    raw: config.json; config: what transformers read from it.
    """
    kind = str(raw.get("model_type"))
    code = _code(config)
    if raw.get("is_causal") is False:
        raise ImportRefused("config.json says is_causal=false: the model is an encoder, not a decoder")
    epsilon = next((getattr(config, name) for name in NORM_EPSILONS if hasattr(type(config), name)), None)
    for name, neutral in {**NEUTRAL, **dict.fromkeys(NORM_EPSILONS, (epsilon,))}.items():
        value = raw.get(name)
        if value is not None and value not in neutral and name not in code:
            raise ImportRefused(
                f"config.json says {name}={value!r}, which transformers' {kind} does not compute{ADVICE.get(name, '')}"
            )
    _check_rope_fields(raw, config, kind)
    read = cast("dict[str, Any]", getattr(config, "rope_parameters", None) or {})
    layer_types = config.nested_rope_parameter_keys(read)
    for parameters in [read[name] for name in layer_types] if layer_types else [read]:
        if parameters:
            _check_rope_parameters(parameters, config, "partial_rotary_factor" in code)


def context_length(config: PretrainedConfig) -> int:
    """The longest sequence that the network was made for: with YaRN, the trained length times the factor.

    Raises ImportRefused if the configuration does not say.
    """
    length = getattr(config, "max_position_embeddings", None)
    if not isinstance(length, int) or length < 1:
        raise ImportRefused("config.json does not say max_position_embeddings, the length the model was trained for")
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "yarn" and rope["factor"] is not None:
        return int(rope["factor"] * rope["original_max_position_embeddings"])
    return length


def _code(config: PretrainedConfig) -> str:
    """transformers' own code of this architecture: a field that it does not mention has no effect."""
    model = cast("type[object]", MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])
    return "".join(inspect.getsource(cast("Any", inspect.getmodule(kind))) for kind in (type(config), model))


def _check_rope_fields(raw: Mapping[str, Any], config: PretrainedConfig, kind: str) -> None:
    """Whether the fields that say the same agree, and transformers took what they say."""
    written: dict[str, Any] = raw.get("rope_scaling") or {}
    read: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    if written and raw.get("rope_parameters"):
        raise ImportRefused("config.json has both rope_scaling and rope_parameters: write all values into the latter")
    if not isinstance(written, dict) or any(read.get(name) != value for name, value in written.items()):
        raise ImportRefused(f"config.json has rope_scaling, which transformers' {kind} does not read as it is written")
    for name in ("rope_theta", "partial_rotary_factor"):
        if raw.get(name) is not None and name in read and read[name] != raw[name]:
            raise ImportRefused(
                f"config.json says {name}={raw[name]!r}, and {read[name]!r} in rope_parameters: remove one of them"
            )


def _check_rope_parameters(rope: Mapping[str, Any], config: PretrainedConfig, has_partial_rotation: bool) -> None:
    name = str(rope.get("rope_type", "default"))
    if name != "default" and name not in ROPE_INIT_FUNCTIONS:
        raise ImportRefused(f"config.json says rope_type {name!r}, which transformers does not know")
    known = COMMON_ROPE_KEYS | set(config.ignore_keys_at_rope_validation or ())
    unread = sorted(rope.keys() - known - ROPE_KEYS[name]) if name in ROPE_KEYS else []
    if unread:
        raise ImportRefused(f"config.json gives rope_type {name!r} the value {unread[0]!r}, which it does not use")
    if rope.get("partial_rotary_factor", 1) != 1 and not has_partial_rotation:
        raise ImportRefused("config.json says partial_rotary_factor, which transformers does not compute here")
    for key in ("factor", "original_max_position_embeddings"):
        value = 1 if rope.get(key) is None else rope[key]
        if isinstance(value, bool) or not isinstance(value, int | float) or not 1 <= value < float("inf"):
            raise ImportRefused(f"config.json has no usable {key!r} of rotary positions ({value!r})")
