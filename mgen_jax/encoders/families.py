"""The families of encoders: their modules, and what public files call their tensors.

The rules from the names of a Hugging Face file to the paths of our parameters, and the translation
of config.json in both directions. Not here: what is done with them (`mgen_jax/weights`) and named
sizes (`sizes.py`).
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mgen_jax.errors import UserError
from mgen_jax.models import clip, llama, t5
from mgen_jax.weights import rules as rules_lib
from mgen_jax.weights.rules import Family, Rule, Shape


def boxed_shapes(name: str, config: Any) -> Any:
  """The parameters of a config as shapes in boxes of logical axis names; nothing is computed."""
  return rules_lib.boxed_shapes(FAMILIES[name], config)


def count_parameters(name: str, config: Any) -> int:
  """How many parameters a config has, by shape evaluation."""
  return sum(leaf.size for leaf in jax.tree.leaves(nn.unbox(boxed_shapes(name, config))))


# --------------------------------------------------------------------------------------------------
# T5.

_T5_ACTIVATIONS = {"relu": "relu", "gated-gelu": "gated_gelu", "gated-silu": "gated_silu"}


def _t5_rules(config: t5.T5Config) -> tuple[Rule, ...]:
  layer = "encoder.block.{i}.layer."
  attention, mlp = layer + "0.SelfAttention.", layer + "1.DenseReluDense."
  names = {"query": "q", "key": "k", "value": "v", "out": "o"}
  gated = config.activation != "relu"
  hidden = {"gate": "wi_0", "up": "wi_1"} if gated else {"up": "wi"}
  bias = "relative_attention_bias.weight"
  if config.shared_bias:
    first = attention.replace("{i}", "0")
    table = Rule("position_bias/table", first + bias)
  else:
    table = Rule("layers/position_bias/table", attention + bias)
  return (
    Rule("embedding", "shared.weight"),
    table,
    *(
      Rule(f"layers/attention/{ours}/kernel", f"{attention}{theirs}.weight", "transpose")
      for ours, theirs in names.items()
    ),
    Rule("layers/attention_norm/scale", layer + "0.layer_norm.weight"),
    *(
      Rule(f"layers/mlp/{ours}/kernel", f"{mlp}{theirs}.weight", "transpose")
      for ours, theirs in {**hidden, "down": "wo"}.items()
    ),
    Rule("layers/mlp_norm/scale", layer + "1.layer_norm.weight"),
    Rule("norm/scale", "encoder.final_layer_norm.weight"),
  )


def _t5_canonical(name: str) -> str | None:
  if name.startswith("decoder.") or name == "lm_head.weight":
    return None
  return "shared.weight" if name == "encoder.embed_tokens.weight" else name


def _t5_from_hf(hf: Mapping[str, Any], names: Mapping[str, Shape]) -> t5.T5Config:
  del names
  activation = hf.get("feed_forward_proj", "relu")
  if activation not in _T5_ACTIVATIONS:
    known = ", ".join(_T5_ACTIVATIONS)
    raise UserError(f"feed_forward_proj is {activation!r} in config.json: known are {known}.")
  return t5.T5Config(
    vocab=hf.get("vocab_size", 32128),
    width=hf.get("d_model", 512),
    layers=hf.get("num_layers", 6),
    heads=hf.get("num_heads", 8),
    head_dim=hf.get("d_kv", 64),
    mlp_width=hf.get("d_ff", 2048),
    activation=_T5_ACTIVATIONS[activation],
    buckets=hf.get("relative_attention_num_buckets", 32),
    max_distance=hf.get("relative_attention_max_distance", 128),
    shared_bias=hf.get("model_type") != "umt5",
    norm_eps=hf.get("layer_norm_epsilon", 1e-6),
  )


def _t5_to_hf(config: t5.T5Config) -> dict[str, Any]:
  activations = {ours: theirs for theirs, ours in _T5_ACTIVATIONS.items()}
  kind = "T5" if config.shared_bias else "UMT5"
  return {
    "architectures": [f"{kind}EncoderModel"],
    "model_type": kind.lower(),
    "vocab_size": config.vocab,
    "d_model": config.width,
    "d_kv": config.head_dim,
    "d_ff": config.mlp_width,
    "num_layers": config.layers,
    "num_heads": config.heads,
    "relative_attention_num_buckets": config.buckets,
    "relative_attention_max_distance": config.max_distance,
    "layer_norm_epsilon": config.norm_eps,
    "feed_forward_proj": activations[config.activation],
    "is_encoder_decoder": False,
    "use_cache": False,
    "pad_token_id": 0,
    "eos_token_id": 1,
  }


# --------------------------------------------------------------------------------------------------
# CLIP.


def _clip_layers() -> tuple[Rule, ...]:
  layer = "encoder.layers.{i}."
  names = {
    **{
      ours: f"self_attn.{theirs}"
      for ours, theirs in {
        "query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "out_proj",
      }.items()
    },
    "up": "mlp.fc1",
    "down": "mlp.fc2",
  }  # fmt: skip
  norms = {"attention_norm": "layer_norm1", "mlp_norm": "layer_norm2"}
  return (
    *(
      rule
      for ours, theirs in names.items()
      for rule in (
        Rule(f"layers/{ours}/kernel", f"{layer}{theirs}.weight", "transpose"),
        Rule(f"layers/{ours}/bias", f"{layer}{theirs}.bias"),
      )
    ),
    *(
      rule for ours, theirs in norms.items() for rule in _norm(f"layers/{ours}", f"{layer}{theirs}")
    ),
  )


def _norm(ours: str, theirs: str) -> tuple[Rule, Rule]:
  return Rule(f"{ours}/scale", f"{theirs}.weight"), Rule(f"{ours}/bias", f"{theirs}.bias")


def _clip_text_rules(config: clip.ClipTextConfig) -> tuple[Rule, ...]:
  projection = Rule("projection/kernel", "text_projection.weight", "transpose")
  return (
    Rule("embedding", "embeddings.token_embedding.weight"),
    Rule("positions", "embeddings.position_embedding.weight"),
    *_clip_layers(),
    *_norm("norm", "final_layer_norm"),
    *([] if config.projection is None else [projection]),
  )


def _clip_vision_rules(config: clip.ClipVisionConfig) -> tuple[Rule, ...]:
  projection = Rule("projection/kernel", "visual_projection.weight", "transpose")
  return (
    Rule("class_token", "embeddings.class_embedding"),
    Rule("patch", "embeddings.patch_embedding.weight", "conv"),
    Rule("positions", "embeddings.position_embedding.weight"),
    *_norm("norm_before", "pre_layrnorm"),  # so spelled in every file
    *_clip_layers(),
    *_norm("norm", "post_layernorm"),
    *([] if config.projection is None else [projection]),
  )


def _clip_canonical(tower: str) -> Callable[[str], str | None]:
  """transformers 4 writes "text_model." before the names of a bare tower, 5 does not."""
  own, other = f"{tower}_model.", "vision_model." if tower == "text" else "text_model."
  foreign = "visual_projection.weight" if tower == "text" else "text_projection.weight"

  def canonical(name: str) -> str | None:
    if name.startswith(other) or name in (foreign, "logit_scale"):
      return None
    name = name.removeprefix(own)
    return None if name == "embeddings.position_ids" else name

  return canonical


def _clip_part(hf: Mapping[str, Any], part: str) -> dict[str, Any]:
  """The config of one tower, out of a whole CLIP's or its own."""
  inner = dict(hf.get(part) or {})
  return {**inner, "projection_dim": hf.get("projection_dim", 512)} if inner else dict(hf)


def _clip_activation(hf: Mapping[str, Any]) -> str:
  activation = hf.get("hidden_act", "quick_gelu")
  if activation not in ("quick_gelu", "gelu"):
    raise UserError(f"hidden_act is {activation!r} in config.json: known are quick_gelu, gelu.")
  return activation


def _clip_text_from_hf(hf: Mapping[str, Any], names: Mapping[str, Shape]) -> clip.ClipTextConfig:
  part = _clip_part(hf, "text_config")
  # An eos of 2 stands in configs that were written before the key had a meaning; the models of
  # MetaCLIP 2 have that token.
  eos = part.get("eos_token_id", 49407)
  legacy = eos == 2 and not str(hf.get("model_type", "")).startswith("metaclip_2")
  return clip.ClipTextConfig(
    vocab=part.get("vocab_size", 49408),
    width=part.get("hidden_size", 512),
    layers=part.get("num_hidden_layers", 12),
    heads=part.get("num_attention_heads", 8),
    mlp_width=part.get("intermediate_size", 2048),
    max_positions=part.get("max_position_embeddings", 77),
    activation=_clip_activation(part),
    projection=part.get("projection_dim", 512) if "text_projection.weight" in names else None,
    pooling="argmax" if legacy else "eos",
    eos=eos,
    norm_eps=part.get("layer_norm_eps", 1e-5),
  )


def _clip_vision_from_hf(
  hf: Mapping[str, Any], names: Mapping[str, Shape]
) -> clip.ClipVisionConfig:
  part = _clip_part(hf, "vision_config")
  return clip.ClipVisionConfig(
    image_size=part.get("image_size", 224),
    patch=part.get("patch_size", 32),
    width=part.get("hidden_size", 768),
    layers=part.get("num_hidden_layers", 12),
    heads=part.get("num_attention_heads", 12),
    mlp_width=part.get("intermediate_size", 3072),
    activation=_clip_activation(part),
    projection=part.get("projection_dim", 512) if "visual_projection.weight" in names else None,
    norm_eps=part.get("layer_norm_eps", 1e-5),
  )


def _clip_to_hf(config: clip.ClipTextConfig | clip.ClipVisionConfig) -> dict[str, Any]:
  text = isinstance(config, clip.ClipTextConfig)
  tower = "Text" if text else "Vision"
  own = (
    {
      "vocab_size": config.vocab,
      "max_position_embeddings": config.max_positions,
      "eos_token_id": config.eos,
      "bos_token_id": config.vocab - 2,
      "pad_token_id": 1,
    }
    if text
    else {"image_size": config.image_size, "patch_size": config.patch}
  )
  return {
    "architectures": [f"CLIP{tower}Model{'' if config.projection is None else 'WithProjection'}"],
    "model_type": f"clip_{tower.lower()}_model",
    **own,
    "hidden_size": config.width,
    "intermediate_size": config.mlp_width,
    "num_hidden_layers": config.layers,
    "num_attention_heads": config.heads,
    "hidden_act": config.activation,
    "layer_norm_eps": config.norm_eps,
    "projection_dim": config.projection or 512,
  }


# --------------------------------------------------------------------------------------------------
# LLaMA.


def _llama_rules(config: llama.LlamaConfig) -> tuple[Rule, ...]:
  layer = "layers.{i}."
  names = {
    **{
      f"attention/{ours}": f"self_attn.{theirs}_proj"
      for ours, theirs in {"query": "q", "key": "k", "value": "v", "out": "o"}.items()
    },
    **{f"mlp/{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")},
  }
  head = Rule("head/kernel", "lm_head.weight", "transpose")
  return (
    Rule("embedding", "embed_tokens.weight"),
    *(
      Rule(f"layers/{ours}/kernel", f"{layer}{theirs}.weight", "transpose")
      for ours, theirs in names.items()
    ),
    Rule("layers/attention_norm/scale", layer + "input_layernorm.weight"),
    Rule("layers/mlp_norm/scale", layer + "post_attention_layernorm.weight"),
    Rule("norm/scale", "norm.weight"),
    *([] if config.tied else [head]),
  )


def _llama_canonical(name: str) -> str | None:
  name = name.removeprefix("model.")
  return None if re.fullmatch(r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq", name) else name


_LLAMA_ROPE = {
  "rope_factor": "factor",
  "rope_low": "low_freq_factor",
  "rope_high": "high_freq_factor",
  "rope_original": "original_max_position_embeddings",
}


def _llama_scaling(rope: Mapping[str, Any]) -> dict[str, Any]:
  lost = [theirs for theirs in _LLAMA_ROPE.values() if theirs not in rope]
  if lost:
    raise UserError(f"config.json has rotary positions of type llama3 without {', '.join(lost)}.")
  made = {ours: float(rope[theirs]) for ours, theirs in _LLAMA_ROPE.items()}
  return {**made, "rope_original": int(made["rope_original"])}


def _llama_from_hf(hf: Mapping[str, Any], names: Mapping[str, Shape]) -> llama.LlamaConfig:
  rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
  kind = rope.get("rope_type", rope.get("type", "default"))
  if kind not in ("default", "llama3"):
    raise UserError(
      f"config.json asks for rotary positions of type {kind!r}: those of LLaMA 3 (default) and 3.1 "
      "(llama3) are known."
    )
  if hf.get("attention_bias") or hf.get("mlp_bias"):
    raise UserError("config.json asks for biases in attention or MLP: a LLaMA 3 has none.")
  width, heads = hf.get("hidden_size", 4096), hf.get("num_attention_heads", 32)
  if (hf.get("head_dim") or width // heads) != width // heads:
    raise UserError(
      f"config.json has head_dim {hf['head_dim']}, which is not hidden_size / heads: this is no "
      "LLaMA 3."
    )
  scaling = _llama_scaling(rope) if kind == "llama3" else {}
  return llama.LlamaConfig(
    vocab=hf.get("vocab_size", 32000),
    width=width,
    layers=hf.get("num_hidden_layers", 32),
    heads=heads,
    kv_heads=hf.get("num_key_value_heads") or heads,
    mlp_width=hf.get("intermediate_size", 11008),
    max_positions=hf.get("max_position_embeddings", 2048),
    rope_theta=float(rope.get("rope_theta", hf.get("rope_theta", 10_000.0))),
    **scaling,
    tied="lm_head.weight" not in names and bool(hf.get("tie_word_embeddings", False)),
    norm_eps=hf.get("rms_norm_eps", 1e-6),
  )


def _llama_to_hf(config: llama.LlamaConfig) -> dict[str, Any]:
  scaling = {theirs: getattr(config, ours) for ours, theirs in _LLAMA_ROPE.items()}
  rope = {"rope_scaling": {"rope_type": "llama3", **scaling}} if config.rope_factor != 1 else {}
  return {
    **rope,
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": config.vocab,
    "hidden_size": config.width,
    "intermediate_size": config.mlp_width,
    "num_hidden_layers": config.layers,
    "num_attention_heads": config.heads,
    "num_key_value_heads": config.kv_heads,
    "max_position_embeddings": config.max_positions,
    "rope_theta": config.rope_theta,
    "rms_norm_eps": config.norm_eps,
    "tie_word_embeddings": config.tied,
    "hidden_act": "silu",
  }


# --------------------------------------------------------------------------------------------------
# All of them.


def _tokens(config: t5.T5Config) -> tuple:
  del config
  return jnp.ones((1, 2), jnp.int32), jnp.ones((1, 2), bool)


def _unmasked(config: clip.ClipTextConfig | llama.LlamaConfig) -> tuple:
  return _tokens(config)[:1]


def _image(config: clip.ClipVisionConfig) -> tuple:
  return (jnp.zeros((1, config.image_size, config.image_size, 3)),)


FAMILIES = {
  family.name: family
  for family in (
    Family(
      *("t5", t5.T5Config, t5.T5Encoder, _tokens, _t5_rules, _t5_canonical, _t5_from_hf, _t5_to_hf),
      kinds=("t5", "mt5", "umt5"),
    ),
    Family(
      *("clip_text", clip.ClipTextConfig, clip.ClipText, _unmasked, _clip_text_rules),
      *(_clip_canonical("text"), _clip_text_from_hf, _clip_to_hf),
      kinds=("clip", "metaclip_2", "clip_text_model", "metaclip_2_text_model"),
    ),
    Family(
      *("clip_vision", clip.ClipVisionConfig, clip.ClipVision, _image, _clip_vision_rules),
      *(_clip_canonical("vision"), _clip_vision_from_hf, _clip_to_hf),
      kinds=("clip", "metaclip_2", "clip_vision_model", "metaclip_2_vision_model"),
    ),
    Family(
      *("llama", llama.LlamaConfig, llama.Llama, _unmasked, _llama_rules),
      *(_llama_canonical, _llama_from_hf, _llama_to_hf),
      kinds=("llama",),
      spare=lambda config: ("lm_head.weight",) if config.tied else (),
    ),
  )
}
