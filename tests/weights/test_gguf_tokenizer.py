"""Tokenizers rebuilt from GGUF metadata: how each kind cuts text, SentencePiece by its scores, bad metadata."""

import itertools

import gguf
import pytest
from checkpoint_files import write_gguf
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from cupaged.errors import CheckpointError
from cupaged.tokenizer import Tokenizer
from cupaged.weights.checkpoint import Checkpoint
from cupaged.weights.gguf_tokenizer import read_tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
# Merges across every place where some kind cuts.
MERGES = ["1 2", "12 3", "123 4", "Ġ 1", "' S", "' s", "Ġ a", "Ċ Ċ", "! Ċ", ". a", "a b", "Ġ Ġ", "Ì ģ", "e Ìģ", "Ã ©"]


def byte_level(pre="gpt-2", **changes):
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in MERGES)]
    types = [NORMAL] * len(tokens) + [CONTROL, CONTROL, USER_DEFINED, UNUSED]
    tokens += ["<s>", "</s>", "<think>", "[PAD]"]
    metadata = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": types,
        "merges": MERGES,
        "bos_token_id": tokens.index("<s>"),
        "eos_token_id": tokens.index("</s>"),
    }
    return {f"tokenizer.ggml.{k}": v for k, v in {**metadata, **changes}.items() if v is not None}


def build(metadata):
    backend, config = read_tokenizer(metadata, "model.gguf")
    return Tokenizer(backend, config, None, source="model.gguf")


def tokens_of(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    return [tokenizer.backend.id_to_token(token_id) for token_id in ids]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" 1", {"gpt-2": "Ġ1", "smollm": "Ġ 1", "llama-bpe": "Ġ 1", "qwen2": "Ġ 1"}),
        ("1234", {"gpt-2": "1234", "smollm": "1 2 3 4", "llama-bpe": "123 4", "qwen2": "1 2 3 4"}),
        ("a'S", {"gpt-2": "a ' S", "smollm": "a ' S", "llama-bpe": "a 'S", "qwen2": "a 'S"}),
        ("a's", {"gpt-2": "a 's", "smollm": "a 's", "llama-bpe": "a 's", "qwen2": "a 's"}),
        ("!\n", {"gpt-2": "! Ċ", "smollm": "! Ċ", "llama-bpe": "!Ċ", "qwen2": "!Ċ"}),
        (".ab", {"gpt-2": ". ab", "smollm": ". ab", "llama-bpe": ".a b", "qwen2": ".a b"}),
        ("  ab", {"gpt-2": "Ġ Ġa b", "smollm": "Ġ Ġa b", "llama-bpe": "Ġ Ġa b", "qwen2": "Ġ Ġa b"}),
        ("\n\n", {"gpt-2": "ĊĊ", "smollm": "ĊĊ", "llama-bpe": "ĊĊ", "qwen2": "ĊĊ"}),
        ("a<think>b", {"gpt-2": "a <think> b", "llama-bpe": "a <think> b"}),
        # two characters, which Qwen composes into one
        ("e\u0301", {"gpt-2": "e Ìģ", "smollm": "e Ìģ", "llama-bpe": "e Ìģ", "qwen2": "Ã©"}),
    ],
)
def test_each_kind_cuts_as_its_model_does(text, expected):
    for pre, tokens in expected.items():
        assert " ".join(tokens_of(build(byte_level(pre)), text)) == tokens, pre


def test_llama3_takes_a_word_that_is_a_token_whole():
    """Even where no merges lead to it."""
    for pre, expected in (("llama-bpe", ["xyz"]), ("gpt-2", ["x", "y", "z"])):
        metadata = byte_level(pre)
        metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], "xyz"]
        metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"], NORMAL]
        assert tokens_of(build(metadata), "xyz") == expected


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
@settings(max_examples=100, deadline=None)
def test_any_text_comes_back(text):
    for pre in ("gpt-2", "smollm", "llama-bpe"):
        tokenizer = build(byte_level(pre))
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False).removeprefix("<s>") == text


@pytest.mark.parametrize(
    ("pre", "changes", "expected"),
    [
        ("gpt-2", {}, ["a"]),
        ("llama-bpe", {}, ["<s>", "a"]),
        ("llama-bpe", {"add_bos_token": False}, ["a"]),
        ("gpt-2", {"add_bos_token": True, "add_eos_token": True}, ["<s>", "a", "</s>"]),
        ("gpt-2", {"add_bos_token": True, "bos_token_id": None}, ["a"]),
    ],
)
def test_bos_and_eos(pre, changes, expected):
    tokenizer = build(byte_level(pre, **changes))
    assert [tokenizer.backend.id_to_token(i) for i in tokenizer.encode("a")] == expected


def test_marked_tokens():
    tokenizer = build(byte_level())
    ids = tokenizer.encode("<s>a<think>[PAD]</s>")
    assert tokenizer.decode(ids) == "a<think>[PAD]"
    assert tokenizer.eos_token_id == tokenizer.backend.token_to_id("</s>")
    assert tokenizer.backend.token_to_id("[PAD]") is None  # padding of the vocabulary, in pieces if someone writes it


PIECES = ["▁", "a", "b", "c", "é", "ab", "bc", "abc", "▁a", "▁ab", "ca", "▁▁", "cab", "aa", "aaa"]


def sentencepiece(scores, **changes):
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]
    metadata = {
        "model": "llama",
        "tokens": tokens,
        "scores": [0.0] * 259 + list(scores),
        "token_type": [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * len(PIECES),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    return {f"tokenizer.ggml.{k}": v for k, v in {**metadata, **changes}.items()}


def join_by_score(text, scores):
    """SentencePiece's rule, straight: join the neighbours that make the best-scored piece, the leftmost of equals."""
    score_of = dict(zip(PIECES, scores, strict=True))
    symbols = list(text)
    while True:
        joined = [(-score_of[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(symbols)) if a + b in score_of]
        if not joined:
            break
        _, i = min(joined)
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
    ids = []
    for symbol in symbols:
        ids += [259 + PIECES.index(symbol)] if symbol in score_of else [3 + byte for byte in symbol.encode()]
    return ids


@settings(max_examples=300, deadline=None)
@given(
    text=st.text("abcé 字", max_size=20),
    scores=st.permutations([-float(i) for i in range(len(PIECES))]),
    prefix=st.booleans(),
)
def test_sentencepiece_joins_by_score(text, scores, prefix):
    tokenizer = build(sentencepiece(scores, add_space_prefix=prefix))
    spelled = ("▁" if prefix and text else "") + text.replace(" ", "▁")
    ids = tokenizer.encode(text)
    assert ids == [1, *join_by_score(spelled, scores)]
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (byte_level("deepseek-llm"), "GGUF pre-tokenizer 'deepseek-llm' is not supported"),
        (byte_level(None), "GGUF pre-tokenizer None is not supported"),
        (byte_level(model="bert"), "GGUF tokenizer model 'bert' is not supported"),
        (byte_level(model=None), "GGUF tokenizer model None is not supported"),
        (byte_level(tokens=None), "tokenizer.ggml.tokens is missing"),
        (byte_level(tokens=[1, 2]), "tokenizer.ggml.tokens is missing or no list of str"),
        (byte_level(merges=None), "tokenizer.ggml.merges is missing"),
        (byte_level(merges=["ab"]), "merge 'ab' is not two tokens"),
        (byte_level(merges=["字 a"]), "its tokens and merges don't make a tokenizer"),
        (byte_level(token_type=[1]), "tokenizer.ggml.token_type has 1 entries"),
        (byte_level(eos_token_id=100_000), "tokenizer.ggml.eos_token_id is 100000"),
        (byte_level(bos_token_id="x"), "tokenizer.ggml.bos_token_id is 'x'"),
        (sentencepiece(range(3)), "tokenizer.ggml.scores is missing or no list of float"),
        (sentencepiece([1.0]), "tokenizer.ggml.scores has 260 entries"),
        (sentencepiece([1.0], unknown_token_id=-1), "tokenizer.ggml.unknown_token_id is -1"),
    ],
)
def test_bad_metadata_is_named(metadata, message):
    with pytest.raises(CheckpointError, match=message) as error:
        build(metadata)
    assert "\n" not in str(error.value)


def test_a_whole_file(tmp_path, tensors):
    def add(writer):
        metadata = byte_level("smollm")
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(metadata["tokenizer.ggml.tokens"])
        writer.add_token_types(metadata["tokenizer.ggml.token_type"])
        writer.add_token_merges(MERGES)
        writer.add_eos_token_id(metadata["tokenizer.ggml.eos_token_id"])
        writer.add_chat_template("{{ messages[0].content }}</s>")

    assert gguf.TokenType.UNUSED == UNUSED
    checkpoint = Checkpoint(write_gguf(tmp_path / "model.gguf", tensors, tokenizer=add))
    eos = checkpoint.tokenizer.eos_token_id
    assert checkpoint.eos_token_ids == (eos,)
    text = checkpoint.tokenizer.chat([{"role": "user", "content": "ab"}])
    assert text == [*checkpoint.tokenizer.encode("ab"), eos]
