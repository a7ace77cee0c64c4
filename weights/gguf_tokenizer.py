"""The tokenizer in a GGUF file's metadata, rebuilt for the `tokenizers` library.

A GGUF file stores the tokens and the merges but not how text is cut before merging: it only names the kind
(tokenizer.ggml.pre). What a name stands for is taken from the tokenizer.json that the models themselves publish.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from cupaged.errors import CheckpointError

# tokenizer.ggml.token_type
_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 2, 3, 4, 5

# Contractions; words with one leading mark; digits; punctuation with its line ends; line ends; other whitespace.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_KIND_OF_PRE = {
    "gpt-2": "gpt-2",
    "smollm": "smollm",
    "llama-bpe": "llama3",
    "llama3": "llama3",
    "llama-v3": "llama3",
    "qwen2": "qwen2",
    "deepseek-r1-qwen": "qwen2",
}
_SPECIAL_TOKENS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


def read_tokenizer(metadata: dict[str, Any], path: Path) -> tuple[Tokenizer, dict[str, Any]]:
    """(the tokenizer, tokenizer_config.json's dictionary without the chat template).

    Raises CheckpointError for a kind of tokenizer that can't be rebuilt and for metadata that doesn't fit together.
    """
    return _GGUFTokenizer(metadata, path).build()


class _GGUFTokenizer:
    def __init__(self, metadata: dict[str, Any], path: Path):
        self._metadata = metadata
        self._path = path
        self._tokens: list[str] = self._list("tokens", str)
        self._types: list[int] = self._list("token_type", int, default=[1] * len(self._tokens))
        if len(self._types) != len(self._tokens):
            raise self._broken(
                f"tokenizer.ggml.token_type has {len(self._types)} entries for {len(self._tokens)} tokens"
            )
        # Unused entries only pad the vocabulary to the embedding's size; as tokens they could match text.
        self._vocab = {
            token: i for i, (token, kind) in enumerate(zip(self._tokens, self._types, strict=True)) if kind != _UNUSED
        }

    def build(self) -> tuple[Tokenizer, dict[str, Any]]:
        model = self._metadata.get("tokenizer.ggml.model")
        if model == "gpt2":
            tokenizer, add_bos = self._byte_level()
        elif model == "llama":
            tokenizer, add_bos = self._sentencepiece(), True
        else:
            raise CheckpointError(
                f"{self._path}: GGUF tokenizer model {model!r} is not supported; 'gpt2' and 'llama' are"
            )
        self._add_marked_tokens(tokenizer)
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
        }
        for name, key in _SPECIAL_TOKENS.items():
            token_id = self._metadata.get("tokenizer.ggml." + key)
            if token_id is not None:
                if not isinstance(token_id, int) or not 0 <= token_id < len(self._tokens):
                    raise self._broken(f"tokenizer.ggml.{key} is {token_id!r}, not the id of a token")
                config[name] = self._tokens[token_id]
        self._add_ends(tokenizer, config, add_bos)
        return tokenizer, config

    def _byte_level(self) -> tuple[Tokenizer, bool]:
        """(tokenizer, whether it adds BOS unless the metadata says otherwise)."""
        pre = self._metadata.get("tokenizer.ggml.pre")
        kind = _KIND_OF_PRE.get(pre)
        if kind is None:
            raise CheckpointError(
                f"{self._path}: GGUF pre-tokenizer {pre!r} is not supported; these are: {', '.join(_KIND_OF_PRE)}"
            )
        tokenizer = self._bpe(self._merges(), ignore_merges=kind == "llama3")
        by_words = pre_tokenizers.ByteLevel(add_prefix_space=False)  # splits as GPT-2 does
        only_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        if kind == "gpt-2":
            tokenizer.pre_tokenizer = by_words
        elif kind == "smollm":
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), by_words])
        else:
            split = Regex(_SPLIT % ("{1,3}" if kind == "llama3" else ""))
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(split, "isolated"), only_bytes])
        if kind == "qwen2":
            tokenizer.normalizer = normalizers.NFC()
        tokenizer.decoder = decoders.ByteLevel()
        return tokenizer, kind == "llama3"

    def _sentencepiece(self) -> Tokenizer:
        unknown = self._metadata.get("tokenizer.ggml.unknown_token_id", 0)
        if not isinstance(unknown, int) or not 0 <= unknown < len(self._tokens):
            raise self._broken(f"tokenizer.ggml.unknown_token_id is {unknown!r}, not the id of a token")
        tokenizer = self._bpe(
            self._merges_by_score(), byte_fallback=True, fuse_unk=True, unk_token=self._tokens[unknown]
        )
        prefix = self._metadata.get("tokenizer.ggml.add_space_prefix", True)
        steps = [normalizers.Prepend("▁")] if prefix else []
        tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                *([decoders.Strip(" ", left=1, right=0)] if prefix else []),
            ]
        )
        return tokenizer

    def _bpe(self, merges: list[tuple[str, str]], **options) -> Tokenizer:
        try:
            return Tokenizer(models.BPE(vocab=self._vocab, merges=merges, **options))
        except Exception as error:  # the library raises plain Exception, for a merge of unknown tokens for instance
            raise self._broken(f"its tokens and merges don't make a tokenizer: {error}") from None

    def _merges(self) -> list[tuple[str, str]]:
        merges = []
        for merge in self._list("merges", str):
            left, separator, right = merge.partition(" ")
            if not separator:
                raise self._broken(f"merge {merge!r} is not two tokens")
            merges.append((left, right))
        return merges

    def _merges_by_score(self) -> list[tuple[str, str]]:
        """SentencePiece joins whichever neighbours make the best-scored token: every way to cut a token in two is a
        merge, the best token's first."""
        scores = self._list("scores", float)
        if len(scores) != len(self._tokens):
            raise self._broken(f"tokenizer.ggml.scores has {len(scores)} entries for {len(self._tokens)} tokens")
        merges = []
        for i in sorted(range(len(scores)), key=lambda i: (-scores[i], i)):
            token = self._tokens[i]
            if self._types[i] == 1:
                cuts = ((token[:at], token[at:]) for at in range(1, len(token)))
                merges += [(left, right) for left, right in cuts if left in self._vocab and right in self._vocab]
        return merges

    def _add_marked_tokens(self, tokenizer: Tokenizer) -> None:
        """Control and user-defined tokens are matched whole in text; only control tokens are left out of output."""
        special = [t for t, k in zip(self._tokens, self._types, strict=True) if k in (_CONTROL, _UNKNOWN)]
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
        plain = [t for t, kind in zip(self._tokens, self._types, strict=True) if kind == _USER_DEFINED]
        tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])

    def _add_ends(self, tokenizer: Tokenizer, config: dict[str, Any], add_bos: bool) -> None:
        """A post-processor that adds the tokens which the metadata asks for."""
        bos, eos = config.get("bos_token"), config.get("eos_token")
        before = [bos] if bos and self._metadata.get("tokenizer.ggml.add_bos_token", add_bos) else []
        after = [eos] if eos and self._metadata.get("tokenizer.ggml.add_eos_token", False) else []
        if before or after:
            tokenizer.post_processor = processors.TemplateProcessing(
                single=[*before, "$A", *after],
                pair=[*before, "$A", *after, *(f"{token}:1" for token in before), "$B:1", *(f"{t}:1" for t in after)],
                special_tokens=[(token, self._vocab[token]) for token in {*before, *after}],
            )
        elif self._metadata.get("tokenizer.ggml.model") == "gpt2":
            tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)

    def _list(self, key: str, kind: type, default: list | None = None) -> list:
        values = self._metadata.get("tokenizer.ggml." + key, default)
        if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
            raise self._broken(f"tokenizer.ggml.{key} is missing or no list of {kind.__name__}")
        return values

    def _broken(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self._path}: damaged GGUF file: {what}; fetch it again")
