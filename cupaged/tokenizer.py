"""Text to token ids and back, one token at a time too: `tokenizers` with what a model's directory adds to it."""

from __future__ import annotations

import codecs
import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cupaged.chat_template import ChatTemplate
from cupaged.errors import CheckpointError

if TYPE_CHECKING:
    import tokenizers

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
# Decoders that turn one token into text by itself, but for the text's start.
_TOKENWISE_DECODERS = {"ByteLevel", "ByteFallback", "Replace", "Fuse", "Strip", "Metaspace"}
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Tokenizer:
    """backend: the tokenizers.Tokenizer; config: tokenizer_config.json's dictionary; chat_template: its source, or
    several by name, or None; source: the directory or file, for messages."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        config: Mapping[str, Any],
        chat_template: str | Mapping[str, str] | None,
        source: Path,
    ):
        backend.no_truncation()  # training's limits, which some checkpoints leave in the file
        backend.no_padding()
        self._backend = backend
        self._source = source
        self.special_tokens = {name: text for name in _SPECIAL_NAMES if (text := _token_text(config.get(name)))}
        self.config = dict(config)
        self.chat_template = ChatTemplate(chat_template, str(source)) if chat_template else None
        self._token_bytes = _TokenBytes(backend, source)
        self._texts: dict[frozenset[int], dict[int, str]] = {}  # by the ids that are skipped; see IncrementalDecoder
        self._special_ids = frozenset(i for i, token in backend.get_added_tokens_decoder().items() if token.special)

    @classmethod
    def from_dir(cls, path: str | Path) -> Tokenizer:
        """From tokenizer.json, tokenizer_config.json and chat_template.jinja. Raises CheckpointError."""
        import tokenizers

        path = Path(path)
        file = path / "tokenizer.json"
        if not file.is_file():
            raise CheckpointError(f"{path}: no tokenizer.json there; other kinds of tokenizer files are not read")
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises plain Exception
            raise CheckpointError(f"{file}: broken tokenizer: {error}; fetch it again") from None
        has_config = (path / "tokenizer_config.json").is_file()
        config = read_json(path / "tokenizer_config.json") if has_config else {}
        _set_added_ends(backend, config)
        return cls(backend, config, _read_chat_template(path, config), source=path)

    @property
    def backend(self) -> tokenizers.Tokenizer:
        """The library's own tokenizer, for what this class doesn't offer."""
        return self._backend

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the last token's id. Ids from there on pad the embedding and are never to be drawn."""
        return max(self._backend.get_vocab().values(), default=-1) + 1

    @property
    def eos_token_id(self) -> int | None:
        return self._token_id("eos_token")

    @property
    def bos_token_id(self) -> int | None:
        return self._token_id("bos_token")

    def _token_id(self, name: str) -> int | None:
        return self._backend.token_to_id(self.special_tokens[name]) if name in self.special_tokens else None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """add_special_tokens: begin with BOS, if that is the model's way. Raises ValueError for text that is no
        Unicode (lone surrogates)."""
        try:
            return self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        except (UnicodeEncodeError, TypeError):
            raise ValueError("the text must be a string of valid Unicode; it holds a lone surrogate") from None

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Bytes that are no UTF-8 become U+FFFD; ids that stand for no token give nothing."""
        decoder = self.decoder(skip_special_tokens)
        return "".join([*(decoder.push(token_id) for token_id in ids), decoder.flush()])

    def decoder(self, skip_special_tokens: bool = True) -> IncrementalDecoder:
        skipped_ids = self._special_ids if skip_special_tokens else frozenset()
        return IncrementalDecoder(self._token_bytes, skipped_ids, self._texts.setdefault(skipped_ids, {}))

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The conversation as the model's template writes it; variables (tools, enable_thinking, ...) go to it.

        messages: [{"role": "user", "content": "..."}, ...]. Raises ValueError for messages that are not of that form,
        that the template refuses, or when the model has no template.
        """
        if self.chat_template is None:
            raise ValueError(f"{self._source}: this model has no chat template; give it a plain prompt")
        if isinstance(messages, Mapping | str) or not messages:
            raise ValueError('messages must be a non-empty list of {"role": ..., "content": ...}')
        for i, message in enumerate(messages):
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise ValueError(f'messages[{i}] must be {{"role": ..., "content": ...}}; got {message!r}')
        known = {"tools": None, "documents": None, **self.special_tokens, **variables}
        return self.chat_template.render(messages, {"add_generation_prompt": add_generation_prompt, **known})

    def chat(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **variables: Any
    ) -> list[int]:
        """The token ids of the conversation; see apply_chat_template. The template itself writes BOS."""
        text = self.apply_chat_template(messages, add_generation_prompt, **variables)
        return self.encode(text, add_special_tokens=False)


class IncrementalDecoder:
    """Token ids to text as they come. push() returns what is certain; an unfinished UTF-8 character waits for the
    next token. The pieces, and flush() at the end, join to the decoded whole. A token costs the same wherever it
    stands.

    texts: of tokens that are whole characters, what each adds to a text that ends with a whole character. The decoders
    that skip the same ids share it, and fill it as such tokens are met."""

    def __init__(self, token_bytes: _TokenBytes, skipped_ids: frozenset[int], texts: dict[int, str]):
        self._token_bytes = token_bytes
        self._skipped_ids = skipped_ids
        self._texts = texts
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._at_start = True
        self._is_whole = False  # neither at the start, nor are bytes of an unfinished character held back

    def push(self, token_id: int) -> str:
        if self._is_whole and (text := self._texts.get(token_id)) is not None:  # as most are
            return text
        if token_id in self._skipped_ids:
            return ""
        piece = self._token_bytes[token_id]
        if not piece:  # no token has this id
            return ""
        if self._at_start:
            piece = self._token_bytes.at_start(token_id)
            self._at_start = False
        was_whole, text = self._is_whole, self._utf8.decode(piece)
        self._is_whole = not self._utf8.getstate()[0]
        if was_whole and self._is_whole:
            self._texts[token_id] = text
        return text

    def flush(self) -> str:
        """What was held back: U+FFFD for an unfinished character, else nothing."""
        return self._utf8.decode(b"", final=True)

    def copy(self) -> IncrementalDecoder:
        """Another one that goes on from here."""
        other = IncrementalDecoder(self._token_bytes, self._skipped_ids, self._texts)
        other._at_start, other._is_whole = self._at_start, self._is_whole
        other._utf8.setstate(self._utf8.getstate())
        return other


class _TokenBytes(dict):
    """Token id -> the bytes that it adds to a text, filled as ids are met.

    Byte-level tokens and byte fallbacks are pieces of UTF-8; all others are whole text, which the library's decoder
    gives. That decoder treats the first token differently (the space that SentencePiece puts before a text is taken
    off), so a later token is decoded behind another one.
    """

    def __init__(self, backend: tokenizers.Tokenizer, source: Path):
        super().__init__()
        self._backend = backend
        kinds = _decoder_kinds(backend)
        if unknown := sorted(kinds - _TOKENWISE_DECODERS):
            raise CheckpointError(f"{source}: tokenizer.json: decoder {', '.join(unknown)} is not supported")
        self._byte_fallback = "ByteFallback" in kinds
        self._byte_of = _byte_level_alphabet() if "ByteLevel" in kinds else None
        self._before = [] if self._byte_of else self._plain_token()
        self._before_length = len(self._decode(self._before))

    def __missing__(self, token_id: int) -> bytes:
        piece = self._raw_bytes(token_id)
        if piece is None:
            piece = self._decode([*self._before, token_id])[self._before_length :].encode()
        self[token_id] = piece
        return piece

    def at_start(self, token_id: int) -> bytes:
        """The bytes of a text's first token."""
        piece = self._raw_bytes(token_id)
        is_whole_text = piece is None or (self._byte_fallback and piece.isascii())
        return self._decode([token_id]).encode() if is_whole_text else piece

    def _raw_bytes(self, token_id: int) -> bytes | None:
        """The token's own bytes where it stands for bytes, None where it stands for text."""
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if self._byte_of is not None:
            try:
                return bytes([self._byte_of[character] for character in token])
            except KeyError:
                return token.encode()  # an added token, kept as it is
        if self._byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        return None

    def _decode(self, ids: list[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=False)

    def _plain_token(self) -> list[int]:
        """One token that decodes to letters or digits: what stands behind it is not at the text's start."""
        ids = range(self._backend.get_vocab_size())
        return next(([token_id] for token_id in ids if self._decode([token_id]).isalnum()), [])


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold a JSON object; it holds a {type(value).__name__}")
    return value


def _token_text(entry: Any) -> str | None:
    """A special token is its text, or an object that holds it."""
    return entry.get("content") if isinstance(entry, Mapping) else entry


def _read_chat_template(path: Path, config: Mapping[str, Any]) -> str | dict[str, str] | None:
    file = path / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        try:
            return {entry["name"]: entry["template"] for entry in template}
        except (TypeError, KeyError):
            raise CheckpointError(
                f"{path / 'tokenizer_config.json'}: chat_template must be text or a list of named templates"
            ) from None
    return template


def _set_added_ends(backend: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
    """add_bos_token and add_eos_token in tokenizer_config.json overrule tokenizer.json, as for transformers 5."""
    if "add_bos_token" not in config and "add_eos_token" not in config:
        return
    from tokenizers.processors import TemplateProcessing

    ends = {
        name: text
        for name in ("bos", "eos")
        if config.get(f"add_{name}_token") and (text := _token_text(config.get(f"{name}_token")))
    }
    before, after = [ends[n] for n in ("bos",) if n in ends], [ends[n] for n in ("eos",) if n in ends]
    for text in ends.values():
        if backend.token_to_id(text) is None:
            raise CheckpointError(f"tokenizer_config.json: {text!r} is to be added to every text but is no token")
    backend.post_processor = TemplateProcessing(
        single=[*before, "$A", *after],
        special_tokens=[(text, backend.token_to_id(text)) for text in {*before, *after}],
    )


def _decoder_kinds(backend: tokenizers.Tokenizer) -> set[str]:
    """The types of the decoder's steps."""
    if backend.decoder is None:
        return set()
    state = json.loads(backend.decoder.__getstate__())
    return {step["type"] for step in state.get("decoders", [state])}


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's way to write bytes as characters: printable ones as themselves, the others from U+0100 on, in order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
