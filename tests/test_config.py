"""config.json in all its spellings to ModelConfig, and what is refused."""

import pytest

from cupaged.config import ModelConfig, RopeConfig
from cupaged.errors import CheckpointError

BASE = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 2048,
}
QWEN2 = {**BASE, "architectures": ["Qwen2ForCausalLM"]}
MISTRAL = {**BASE, "architectures": ["MistralForCausalLM"]}


def read(base=BASE, **changes):
    """Keys given as None are taken out."""
    return ModelConfig.from_hf({key: value for key, value in {**base, **changes}.items() if value is not None})


def test_defaults_are_those_of_transformers():
    assert read() == ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=1000,
        hidden_size=256,
        intermediate_size=512,
        num_layers=4,
        num_heads=4,
        num_kv_heads=4,
        head_dim=64,
        max_position_embeddings=2048,
        rms_norm_eps=1e-6,
        rope=RopeConfig("default", 10000.0),
        dtype="bfloat16",
    )


def test_every_key_is_read():
    config = read(
        num_key_value_heads=2,
        head_dim=80,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        torch_dtype="float16",
        eos_token_id=[2, 7],
        bos_token_id=1,
    )
    assert (config.num_kv_heads, config.head_dim, config.rms_norm_eps) == (2, 80, 1e-5)
    assert (config.tie_word_embeddings, config.dtype) == (True, "float16")
    assert (config.eos_token_ids, config.bos_token_id) == ((2, 7), 1)
    assert config.qkv_size == (4 + 2 * 2) * 80


def test_dtype_of_transformers_5_beats_torch_dtype():
    assert read(dtype="float32", torch_dtype="float16").dtype == "float32"
    assert read(torch_dtype="torch.bfloat16").dtype == "bfloat16"


def test_families_differ_by_data():
    assert not read().qkv_bias
    assert not read().qk_norm
    assert read(QWEN2).qkv_bias
    qwen3 = read(architectures=["Qwen3ForCausalLM"])
    assert qwen3.qk_norm
    assert qwen3.head_dim == 128  # its own default, not hidden_size / num_attention_heads
    assert read(architectures=None, model_type="mistral").architecture == "MistralForCausalLM"


@pytest.mark.parametrize("eos", [5, [5]])
def test_eos_is_one_or_several(eos):
    assert read(eos_token_id=eos).eos_token_ids == (5,)


class TestSlidingWindow:
    def test_llama_has_none(self):
        assert read(sliding_window=16).sliding_window is None

    def test_mistral_slides_everywhere(self):
        assert read(MISTRAL, sliding_window=4096).sliding_window == 4096
        assert read(MISTRAL).sliding_window is None

    def test_qwen_slides_only_when_told_so(self):
        assert read(QWEN2, sliding_window=128).sliding_window is None
        assert read(QWEN2, sliding_window=128, use_sliding_window=False).sliding_window is None
        assert read(QWEN2, sliding_window=128, use_sliding_window=True).sliding_window is None  # from layer 28 on
        both = {"sliding_window": 128, "use_sliding_window": True}
        assert read(QWEN2, **both, max_window_layers=4).sliding_window is None
        assert read(QWEN2, **both, max_window_layers=0).sliding_window == 128

    def test_layer_types_decide(self):
        both = {"sliding_window": 128, "use_sliding_window": True}
        assert read(QWEN2, **both, layer_types=["full_attention"] * 4).sliding_window is None
        assert read(QWEN2, **both, layer_types=["sliding_attention"] * 4).sliding_window == 128

    @pytest.mark.parametrize(
        "changes", [{"max_window_layers": 2}, {"layer_types": ["full_attention", "sliding_attention"] * 2}]
    )
    def test_mixed_layers_are_refused(self, changes):
        with pytest.raises(CheckpointError, match="with and without a sliding window"):
            read(QWEN2, sliding_window=128, use_sliding_window=True, **changes)

    def test_unknown_layer_types_are_named(self):
        with pytest.raises(CheckpointError, match="layer_types chunked_attention"):
            read(MISTRAL, sliding_window=128, layer_types=["chunked_attention"] * 4)


class TestRope:
    LLAMA3 = {  # noqa: RUF012
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }

    def test_both_spellings_mean_the_same(self):
        four = read(rope_theta=500000.0, rope_scaling={"rope_type": "llama3", **self.LLAMA3}).rope
        five = read(rope_parameters={"rope_type": "llama3", "rope_theta": 500000.0, **self.LLAMA3}).rope
        oldest = read(rope_theta=500000.0, rope_scaling={"type": "llama3", **self.LLAMA3}).rope
        expected = RopeConfig("llama3", 500000.0, 8.0, 1.0, 4.0, original_max_position_embeddings=8192)
        assert four == five == oldest == expected

    def test_linear(self):
        assert read(rope_scaling={"type": "linear", "factor": 4}).rope == RopeConfig("linear", 10000.0, 4)

    def test_yarn(self):
        rope = read(rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}).rope
        assert rope == RopeConfig("yarn", 10000.0, 4.0, original_max_position_embeddings=512)
        # without a factor: the ratio of the two lengths
        assert read(rope_scaling={"rope_type": "yarn", "original_max_position_embeddings": 512}).rope.factor == 4.0
        # a ratio of scales, as DeepSeek writes it: equal ones cancel
        equal = {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 0.7}
        assert read(rope_scaling=equal).rope.attention_factor == pytest.approx(1.0)
        assert read(rope_scaling={**equal, "attention_factor": 1.5}).rope.attention_factor == 1.5

    def test_partial(self):
        assert read(partial_rotary_factor=0.5).rope.rotary_dim == 32
        assert read(rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.25}).rope.rotary_dim == 16
        assert read(partial_rotary_factor=1.0).rope.rotary_dim == 0  # all

    @pytest.mark.parametrize("factor", [0.0, 1.5, 0.046875])  # none, too many, an odd number of dimensions
    def test_partial_must_make_pairs(self, factor):
        with pytest.raises(CheckpointError, match="partial_rotary_factor"):
            read(partial_rotary_factor=factor)

    @pytest.mark.parametrize("kind", ["dynamic", "longrope", "su", "mrope"])
    def test_other_kinds_are_named(self, kind):
        with pytest.raises(CheckpointError, match=f"rope type '{kind}' is not supported"):
            read(rope_scaling={"rope_type": kind, "factor": 2.0})

    @pytest.mark.parametrize(
        ("scaling", "message"),
        [
            ({"rope_type": "linear"}, "factor is missing"),
            ({"rope_type": "linear", "factor": 0}, "factor must be above 0"),
            ({"rope_type": "linear", "factor": "2"}, "factor must be a number; got '2'"),
            ({"rope_type": "llama3", "factor": 8.0}, "low_freq_factor is missing"),
            ({"rope_type": "yarn", "factor": 2.0, "truncate": False}, "truncate false"),
            ({"full_attention": {"rope_type": "default"}}, "differ between layers"),
            ("linear", "rope_scaling must be an object"),
        ],
    )
    def test_nonsense_is_named(self, scaling, message):
        with pytest.raises(CheckpointError, match=message):
            read(rope_scaling=scaling)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, "'MixtralForCausalLM' is not supported"),
        ({"architectures": None}, "model_type is missing"),
        ({"architectures": None, "model_type": "gemma"}, "'gemma' is not supported"),
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"hidden_size": "256"}, "hidden_size must be an integer >= 1; got '256'"),
        ({"hidden_size": True}, "hidden_size must be an integer >= 1; got True"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be an integer >= 1; got 0"),
        ({"num_attention_heads": 3}, "must be a multiple of num_attention_heads"),
        ({"num_key_value_heads": 3}, "must be a multiple of num_key_value_heads"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"attention_bias": True}, "attention_bias true"),
        ({"mlp_bias": True}, "mlp_bias true"),
        ({"torch_dtype": "float8_e4m3fn"}, "dtype 'float8_e4m3fn'"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantization_config \(gptq\)"),
        ({"eos_token_id": "</s>"}, "eos_token_id must be a token id"),
        ({"eos_token_id": [1, -2]}, "eos_token_id must be a token id"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a number"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
        ({"rope_theta": -1.0}, "rope_theta must be above 0"),
    ],
)
def test_what_is_refused_is_named_in_one_line(changes, message):
    with pytest.raises(CheckpointError, match=message) as error:
        read(**changes)
    assert "\n" not in str(error.value)


def test_a_config_that_is_no_object_is_refused():
    with pytest.raises(CheckpointError, match="must be a JSON object"):
        ModelConfig.from_hf([])
