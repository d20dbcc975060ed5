"""The names of umT5's tensors in every layout that it is published in, as tables; strict and one to one."""

from __future__ import annotations

from .config import UMT5Config

# own name, official (wan/modules/t5.py), Hugging Face (UMT5EncoderModel), GGUF (llama.cpp, architecture t5encoder)
OWN, OFFICIAL, HUGGING_FACE, GGUF = range(4)
GLOBAL_NAMES = (
    ("token_embedding", "token_embedding", "shared", "token_embd"),
    ("norm", "norm", "encoder.final_layer_norm", "enc.output_norm"),
)
BLOCK_NAMES = (
    ("norm1", "norm1", "layer.0.layer_norm", "attn_norm"),
    ("attn.q", "attn.q", "layer.0.SelfAttention.q", "attn_q"),
    ("attn.k", "attn.k", "layer.0.SelfAttention.k", "attn_k"),
    ("attn.v", "attn.v", "layer.0.SelfAttention.v", "attn_v"),
    ("attn.o", "attn.o", "layer.0.SelfAttention.o", "attn_o"),
    ("position_bias", "pos_embedding.embedding", "layer.0.SelfAttention.relative_attention_bias", "attn_rel_b"),
    ("norm2", "norm2", "layer.1.layer_norm", "ffn_norm"),
    ("ffn.gate", "ffn.gate.0", "layer.1.DenseReluDense.wi_0", "ffn_gate"),
    ("ffn.up", "ffn.fc1", "layer.1.DenseReluDense.wi_1", "ffn_up"),
    ("ffn.down", "ffn.fc2", "layer.1.DenseReluDense.wo", "ffn_down"),
)
BLOCK_PREFIXES = ("blocks", "blocks", "encoder.block", "enc.blk")
# other spellings of official names, and what they stand for
SPELLINGS = ((".attention.", ".attn."), ("final_norm.", "norm."))
COMFY = "text_encoders.umt5xxl."  # of ComfyUI's files with several models; "transformer." follows it but for markers
PREFIXES = ("umt5xxl.transformer.", "text_encoder.", "model.")
# our field: Hugging Face's field; dim_attn is d_kv * num_heads there
HF_FIELDS = {
    "vocab_size": "vocab_size",
    "dim": "d_model",
    "dim_ffn": "d_ff",
    "num_heads": "num_heads",
    "num_layers": "num_layers",
    "num_buckets": "relative_attention_num_buckets",
    "max_distance": "relative_attention_max_distance",
}
# a whole encoder-decoder carries these besides
DECODER = ("decoder.", "lm_head.", "dec.", "output.")
HF_EMBEDDING, HF_EMBEDDING_COPY = "shared.weight", "encoder.embed_tokens.weight"
SPIECE = "spiece_model"  # a uint8 tensor with the whole tokenizer, in ComfyUI's files
COMFY_EXTRAS = (SPIECE, "logit_scale")  # what is no part of the encoder there


def table(layers: int, source: int, target: int) -> dict[str, str]:
    """Tensor names of one layout to those of another."""
    blocks = [
        tuple(f"{prefix}.{i}.{name}" for prefix, name in zip(BLOCK_PREFIXES, row, strict=True))
        for i in range(layers)
        for row in BLOCK_NAMES
    ]
    return {f"{row[source]}.weight": f"{row[target]}.weight" for row in (*GLOBAL_NAMES, *blocks)}


def official_names(config: UMT5Config) -> dict[str, str]:
    """Own tensor name to official tensor name."""
    return table(config.num_layers, OWN, OFFICIAL)


def hf_names(config: UMT5Config) -> dict[str, str]:
    """Own tensor name to Hugging Face tensor name."""
    return table(config.num_layers, OWN, HUGGING_FACE)
