"""A tiny random Llama as a Hugging Face directory and as a GGUF file, and the part of a backend that loading needs."""

import gguf
import numpy as np

from cupaged.config import ModelConfig
from cupaged.weights.packing import parameter_shapes

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}


class HostBackend:
    """The part of a backend that loading needs, in NumPy."""

    name = "cpu"

    def __init__(self, dtype=np.float32):
        self.dtype = np.dtype(dtype)
        self.largest_copy = 0

    def empty(self, shape, dtype):
        array = np.empty(shape, dtype)
        array.view(np.uint8).fill(0xFF)  # NaN in every float type: a row that was left out shows
        return array

    def copy_in(self, dst, src):
        assert dst.shape == src.shape
        assert dst.flags.c_contiguous
        self.largest_copy = max(self.largest_copy, src.size)
        dst[...] = src.astype(dst.dtype)

    def copy(self, dst, src):
        assert (dst.shape, dst.dtype) == (src.shape, src.dtype)
        dst[...] = src


def random_tensors(config, seed=1):
    """Values that float16 and bfloat16 hold exactly, no two rows alike."""
    rng = np.random.default_rng(seed)
    return {
        name: (rng.integers(-128, 128, shape) / 64).astype(np.float32)
        for name, shape in parameter_shapes(ModelConfig.from_hf(config)).items()
    }


GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name):
    """Hugging Face's name in llama.cpp's words; others stay as they are."""
    if not name.startswith("model.layers."):
        top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
        stem, kind = name.rsplit(".", 1)
        return f"{top.get(stem, stem)}.{kind}"
    layer, rest = name.removeprefix("model.layers.").split(".", 1)
    stem, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{GGUF_NAMES[stem]}.{kind}"


def permuted(weight, num_heads):
    """As llama.cpp's converter reorders q and k: the two halves of each head interleaved."""
    halves = weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path, tensors, config=CONFIG, arch="llama", matrix_type="F32", metadata=None, tokenizer=None):
    """A GGUF file of these Hugging Face tensors, by the gguf library's writer. metadata: key -> value, added last."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    for key, value in (metadata or {}).items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, bool: writer.add_bool}
        add[type(value)](key, value)
    if tokenizer is not None:
        tokenizer(writer)
    for name, value in tensors.items():
        if arch == "llama" and ".q_proj." in name:
            value = permuted(value, config["num_attention_heads"])
        elif arch == "llama" and ".k_proj." in name:
            value = permuted(value, config["num_key_value_heads"])
        if value.ndim == 1 or matrix_type == "F32":
            writer.add_tensor(gguf_name(name), value)
        elif matrix_type == "F16":
            writer.add_tensor(gguf_name(name), value.astype(np.float16))
        else:
            kind = gguf.GGMLQuantizationType[matrix_type]
            writer.add_tensor(gguf_name(name), quantized(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def quantized(value, kind):
    """Quantised rows; of the K types, which the library can't write, random blocks with sensible scales."""
    try:
        return gguf.quants.quantize(value, kind)
    except NotImplementedError:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        rng = np.random.default_rng(value.size)
        blocks = rng.integers(0, 256, (*value.shape[:-1], value.shape[-1] // block, size), dtype=np.uint8)
        scale = np.array([0.01], np.float16).view(np.uint8)
        first = size - 2 if kind.name == "Q6_K" else 0  # where the float16 scale stands
        blocks[..., first : first + 2] = scale
        if kind.name in ("Q4_K", "Q5_K"):
            blocks[..., 2:4] = scale
        return blocks.reshape(*value.shape[:-1], -1)
