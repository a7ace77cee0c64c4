"""Make the golden files under golden/ with transformers, in float32 on the CPU.

    python make_golden.py tiny               tiny models of each family with random weights, and their answers
    python make_golden.py rope               tables of cosines and sines
    python make_golden.py real MODEL_DIR     answers of SmolLM2-135M-Instruct, as `cupaged pull` leaves it when it
                                             comes from the package index (Q4_1, dequantised to bfloat16)

Needs torch, transformers and tokenizers; the tests that read the files don't.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

GOLDEN = Path(__file__).parent / "golden"
transformers.utils.logging.disable_progress_bar()

TINY_SHAPE = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 64,
              "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}  # fmt: skip

# Between them: GQA ratios 1 and 2; tied and untied heads; positions past llama3's original context; a window that is
# shorter than the prompts and no multiple of a block; more heads than fit into hidden_size.
TINY_MODELS = {
    "llama": LlamaConfig(
        **TINY_SHAPE, num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
                         "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
    ),
    "llama_untied": LlamaConfig(
        **TINY_SHAPE, num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=False
    ),
    "mistral": MistralConfig(
        **TINY_SHAPE, num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=False, sliding_window=13
    ),
    "qwen2": Qwen2Config(**TINY_SHAPE, num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**TINY_SHAPE, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True),
}  # fmt: skip
PROMPT_LENGTHS = (1, 7, 16, 70, 33)
NUM_GREEDY = 40
# Seeds are tried until each greedy choice is clear of float32's noise and no answer runs in a short circle.
MIN_MARGIN = 0.01  # between a step's two largest logits
MIN_DISTINCT = 8  # tokens of NUM_GREEDY

REAL_TEXTS = [
    "The",
    "\n",
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "1 + 1 = 2\n2 + 2 = 4\n3 + 3 =",
    'def fibonacci(n: int) -> int:\n    """The n-th Fibonacci number."""\n',
    "#include <stdio.h>\n\nint main(void) {\n    for (int i = 0; i < 10; i++) {\n",
    "SELECT name, COUNT(*) FROM orders\n  JOIN customers ON",
    '{"name": "Ada", "born": 1815, "languages": ["English", "French"], "children":',
    "La tour Eiffel est située à Paris. Elle a été construite en",
    "Straßenbahnen fahren in München über die Brücke, während",
    "日本の首都は東京です。大阪は",
    "Москва — столица России, а Киев —",  # noqa: RUF001
    "🙂🚀 Emoji and naïve café: ½ ≠ ⅓, ∑ xᵢ² ≤ ∞ —",
    "The quick brown fox jumps over the lazy dog. " * 6,
    "a a a a a a a a a a a a a a a a",
    "Water boils at 100 degrees Celsius and freezes at",
    "Dear Sir or Madam,\n\nI am writing to apply for the position of",
    "\t\tif x:\n\t\t\treturn [y for y in range(x)]\n\n\t\treturn",
    "ROMEO: But, soft! what light through yonder window breaks?\nJULIET:",
    "| planet | moons |\n|---|---|\n| Earth | 1 |\n| Mars | 2 |\n| Jupiter |",
]
REAL_QUESTIONS = [
    "What is the capital of Italy?",
    "Explain in one sentence why the sky is blue.",
    "Write a Python function that reverses a string.",
    "Übersetze ins Englische: Guten Morgen, wie geht es dir?",
    "List three prime numbers.",
]
NUM_REAL_GREEDY = 64

ROPE_CASES = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
    "yarn": {"rope_type": "yarn", "rope_theta": 1000000.0, "factor": 4.0, "original_max_position_embeddings": 32768},
    "yarn_all": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 16.0, "beta_fast": 24.0, "beta_slow": 2.0,
                 "attention_factor": 0.75, "original_max_position_embeddings": 4096},
    "partial": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 1.0, "partial_rotary_factor": 0.25},
}  # fmt: skip
ROPE_HEAD_DIM = 128
ROPE_POSITIONS = (0, 1, 2, 15, 100, 1000, 8191, 8192, 32767, 100_000)


def random_weights(model: torch.nn.Module, seed: int) -> None:
    """Weights that tell layers, heads and positions apart: scores of a few units before the softmax, logits that
    spread by several units, norms away from 1, biases away from 0."""
    generator = torch.Generator().manual_seed(seed)
    gains = {"embed_tokens": 0.3, "lm_head": 0.4, "q_proj": 2.0, "k_proj": 2.0, "o_proj": 6.0, "down_proj": 6.0}
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name:
            values = 1 + 0.25 * noise
        elif name.endswith("bias"):
            values = noise
        else:
            module = name.split(".")[-2]
            fan_in = 1 if module in ("embed_tokens", "lm_head") else parameter.shape[1]
            values = gains.get(module, 1.0) * noise / fan_in**0.5
        with torch.no_grad():
            parameter.copy_(values)


@torch.no_grad()
def logits_of(model: torch.nn.Module, token_ids) -> np.ndarray:
    """[len(token_ids), vocab_size] float32, without a cache."""
    return model(torch.tensor([list(token_ids)]), use_cache=False).logits[0].numpy()


@torch.no_grad()
def greedy(model: torch.nn.Module, prompt, num_tokens: int) -> tuple[list[int], float]:
    """The tokens that follow the prompt (EOS is a token like others) and the smallest margin between the largest two
    logits along the way."""
    step = model(torch.tensor([list(prompt)]), use_cache=True)
    tokens, margins = [], []
    while True:
        largest = step.logits[0, -1].topk(2)
        tokens.append(int(largest.indices[0]))
        margins.append(float(largest.values[0] - largest.values[1]))
        if len(tokens) == num_tokens:
            return tokens, min(margins)
        step = model(torch.tensor([tokens[-1:]]), past_key_values=step.past_key_values, use_cache=True)


def tiny_answers(name: str) -> dict[str, np.ndarray]:
    """What golden/NAME.npz holds, derived from golden/NAME by transformers: lengths [n]; prompts [sum of lengths];
    last_logits [n, vocab_size] after each prompt; logits [lengths[-1], vocab_size], all rows of the last prompt;
    greedy [n, NUM_GREEDY]; and margins [n], the smallest on the way."""
    model = AutoModelForCausalLM.from_pretrained(GOLDEN / name, dtype=torch.float32, attn_implementation="eager")
    model.eval()
    rng = np.random.default_rng(7)
    prompts = [rng.integers(3, 300, length).astype(np.int32) for length in PROMPT_LENGTHS]
    answers, margins = zip(*(greedy(model, prompt, NUM_GREEDY) for prompt in prompts), strict=True)
    logits = [logits_of(model, prompt) for prompt in prompts]
    return {
        "lengths": np.array(PROMPT_LENGTHS, np.int32),
        "prompts": np.concatenate(prompts),
        "last_logits": np.stack([rows[-1] for rows in logits]),
        "logits": logits[-1],
        "greedy": np.array(answers, np.int32),
        "margins": np.array(margins, np.float32),
    }


def make_tiny() -> None:
    for name, config in TINY_MODELS.items():
        dtype = torch.float16 if name == "llama_untied" else torch.bfloat16
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for seed in range(1000):
            random_weights(model.float(), seed)
            model.to(dtype).save_pretrained(GOLDEN / name)
            answers = tiny_answers(name)
            distinct = [len(set(answer)) for answer in answers["greedy"].tolist()]
            if answers["margins"].min() >= MIN_MARGIN and min(distinct) >= MIN_DISTINCT:
                break
        print(f"{name}: seed {seed}, margins {answers['margins']}, distinct {distinct}, "
              f"logits' deviation {answers['logits'].std():.2f}")  # fmt: skip
        (GOLDEN / name / "generation_config.json").unlink(missing_ok=True)
        np.savez_compressed(GOLDEN / f"{name}.npz", **answers)


def rope_tables() -> dict[str, np.ndarray]:
    """What golden/rope.npz holds: for each case cos and sin [positions, rotary_dim / 2], side by side."""
    tables = {"positions": np.array(ROPE_POSITIONS, np.int32), "cases": np.array(json.dumps(ROPE_CASES))}
    positions = torch.tensor([ROPE_POSITIONS])
    for name, parameters in ROPE_CASES.items():
        config = LlamaConfig(
            hidden_size=2 * ROPE_HEAD_DIM, num_attention_heads=2, max_position_embeddings=131072,
            rope_parameters=dict(parameters),
        )  # fmt: skip
        cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions)
        half = cos.shape[-1] // 2  # transformers repeats each angle in the second half
        tables[name] = torch.cat([cos[0, :, :half], sin[0, :, :half]], dim=-1).numpy()
    return tables


def real_prompts(model_dir: Path) -> dict[str, list[int]]:
    """name -> token ids."""
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False).ids  # noqa: E731
    prompts = {text[:24]: encode(text) for text in REAL_TEXTS}
    prompts |= {
        question[:24]: encode(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")
        for question in REAL_QUESTIONS
    }
    prompts["<|im_start|>"] = [1]
    license_ids = encode((Path(__file__).parents[2] / "LICENSE").read_text())
    return prompts | {f"LICENSE, {length} tokens": license_ids[:length] for length in (128, 129, 600, 1500)}


def real_answers(model_dir: Path) -> dict[str, np.ndarray]:
    """What golden/smollm2.npz holds: weights_digest, of one matrix; names [n]; lengths [n]; prompts [sum of lengths];
    greedy [n, NUM_REAL_GREEDY]; margins [n], the smallest on the way; and of the logits after each prompt: logits
    [n, ids] at logit_ids [ids], top_ids and top_logits [n, 5]."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="eager").eval()
    prompts = real_prompts(model_dir)
    logits = {name: torch.tensor(logits_of(model, ids)[-1]) for name, ids in prompts.items()}
    answers, margins = zip(*(greedy(model, ids, NUM_REAL_GREEDY) for ids in prompts.values()), strict=True)
    for name, margin in zip(prompts, margins, strict=True):
        print(f"{margin:8.4f}  {len(prompts[name]):5} tokens  {name!r}")
    rows = torch.stack(list(logits.values()))
    top = rows.topk(5)
    logit_ids = np.random.default_rng(0).choice(rows.shape[1], 256, replace=False)
    return {
        "weights_digest": np.array(weights_digest(model_dir)),
        "names": np.array(list(prompts)),
        "lengths": np.array([len(ids) for ids in prompts.values()], np.int32),
        "prompts": np.concatenate(list(prompts.values())).astype(np.int32),
        "greedy": np.array(answers, np.int32),
        "margins": np.array(margins, np.float32),
        "logit_ids": logit_ids.astype(np.int32),
        "logits": rows.numpy()[:, logit_ids],
        "top_ids": top.indices.numpy().astype(np.int32),
        "top_logits": top.values.numpy(),
    }


def weights_digest(model_dir: Path) -> str:
    """Tells whether a directory holds the weights that the golden answers were made with."""
    with safe_open(model_dir / "model.safetensors", "pt") as file:
        matrix = file.get_tensor("model.layers.0.self_attn.q_proj.weight")
    return hashlib.sha256(matrix.view(torch.uint16).numpy().tobytes()).hexdigest()


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["tiny"]:
            make_tiny()
        case ["rope"]:
            np.savez_compressed(GOLDEN / "rope.npz", **rope_tables())
        case ["real", model_dir]:
            np.savez_compressed(GOLDEN / "smollm2.npz", **real_answers(Path(model_dir)))
        case _:
            sys.exit(__doc__)
