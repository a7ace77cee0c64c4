"""What a request's sampling parameters do to its logits before a token is drawn: its own functions, then what
Backend.keep_allowed and Backend.edit_logits take."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import numpy as np

from cupaged.backends.base import LOGIT_EDIT, Array
from cupaged.sampling_params import SamplingParams

WORDS_PER_EDIT = LOGIT_EDIT.itemsize // 4


class LogitRules:
    """What one request asks of its logits; the same for all of its sequences.

    prompt_token_ids: count for repetition_penalty. vocab_size: token ids are below it. eos_token_ids: with
    params.stop_token_ids, what min_tokens forbids. tokenizer: has `encode(text, add_special_tokens)`; for bad_words.

    allowed_mask: [ceil(vocab_size / 32)] uint32 as Backend.keep_allowed takes it, or None when all may be drawn.

    Raises ValueError for token ids outside the vocabulary, and for bad_words without a tokenizer.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_token_ids: Sequence[int],
        *,
        vocab_size: int,
        eos_token_ids: Iterable[int] = (),
        tokenizer=None,
    ):
        self.params = params
        self.num_prompt_tokens = len(prompt_token_ids)
        self.logit_bias = dict(params.logit_bias or {})
        _check_token_ids("logit_bias", self.logit_bias, vocab_size)
        self.stop_token_ids = [i for i in {*eos_token_ids, *params.stop_token_ids} if i < vocab_size]
        self.bad_words = _token_sequences(params.bad_words, tokenizer)
        self.processors = [_without_prompt(f, prompt_token_ids) for f in params.logits_processors]
        self.allowed_mask = None
        if params.allowed_token_ids is not None:
            _check_token_ids("allowed_token_ids", params.allowed_token_ids, vocab_size)
            self.allowed_mask = _bitmask(params.allowed_token_ids, vocab_size)

        self.penalizes = params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0
        biased = np.fromiter(self.logit_bias, np.int32, len(self.logit_bias))
        repeated = np.array(prompt_token_ids if params.repetition_penalty != 1 else [], np.int32)
        self.first_edits = _neutral_edits(np.union1d(biased, repeated))
        self.first_edits["repetition_penalty"][np.isin(self.first_edits["token"], repeated)] = params.repetition_penalty
        place = np.searchsorted(self.first_edits["token"], biased)
        with np.errstate(over="ignore"):  # what is beyond float32 is infinite
            self.first_edits["bias"][place] = np.fromiter(self.logit_bias.values(), np.float64, len(biased))

    @staticmethod
    def asked_by(params: SamplingParams) -> bool:
        """Whether there are any: a request without such parameters needs no rules and costs nothing."""
        return bool(
            params.repetition_penalty != 1
            or params.presence_penalty != 0
            or params.frequency_penalty != 0
            or params.logit_bias
            or params.min_tokens
            or params.bad_words
            or params.allowed_token_ids is not None
            or params.logits_processors
        )

    def process(self, token_ids: list[int], logits: Array) -> Array:
        """What params.logits_processors make of the logits [vocab_size] float32 after token_ids (the prompt and the
        output); they may write into them. Raises ValueError that names the one that fails."""
        result = logits
        for i, processor in enumerate(self.processors):
            try:
                result = processor(token_ids[self.num_prompt_tokens :], result)
            except Exception as error:
                raise ValueError(f"logits_processors[{i}] raised {type(error).__name__}: {error}") from error
            if not _is_like(result, logits):
                raise ValueError(
                    f"logits_processors[{i}] must return {_describe(logits)}, C-contiguous; got {_describe(result)}"
                )
        return result

    def forbidden(self, token_ids: Sequence[int]) -> set[int]:
        """The tokens that min_tokens and bad_words keep from following token_ids (the prompt and the output)."""
        is_short = len(token_ids) - self.num_prompt_tokens < self.params.min_tokens
        forbidden = set(self.stop_token_ids) if is_short else set()
        for *beginning, last in self.bad_words:
            start = len(token_ids) - len(beginning)
            if start >= self.num_prompt_tokens and token_ids[start:] == beginning:
                forbidden.add(last)
        return forbidden


class LogitEdits:
    """The edits of one sequence, kept up to date as it grows: a step costs what is new in it.

    There is an entry for each token that the prompt (for repetition_penalty), the output or logit_bias names. Those
    that may not be drawn just now get a bias of -inf until the next step.
    """

    def __init__(self, rules: LogitRules):
        self.rules = rules
        self._edits = rules.first_edits.copy()
        self._num_edits = len(self._edits)
        self._place = {token: i for i, token in enumerate(self._edits["token"].tolist())}
        self._counts: dict[int, int] = {}  # of the output's tokens
        self._num_tokens = rules.num_prompt_tokens  # those before this one are in the edits
        self._forbidden: set[int] = set()

    def after(self, token_ids: list[int]) -> np.ndarray:
        """The edits [n] LOGIT_EDIT of the logits that follow token_ids, `row` left 0; valid until the next call.

        token_ids: the prompt and the output, which only grows from call to call.
        """
        if self.rules.penalizes:
            for token_id in token_ids[self._num_tokens :]:
                self._count(token_id)
        self._num_tokens = len(token_ids)
        forbidden = self.rules.forbidden(token_ids)
        for token_id in self._forbidden - forbidden:
            self._entry(token_id)["bias"] = self.rules.logit_bias.get(token_id, 0)
        for token_id in forbidden - self._forbidden:
            self._entry(token_id)["bias"] = -np.inf
        self._forbidden = forbidden
        return self._edits[: self._num_edits]

    def _count(self, token_id: int) -> None:
        params = self.rules.params
        count = self._counts[token_id] = self._counts.get(token_id, 0) + 1
        entry = self._entry(token_id)
        entry["repetition_penalty"] = params.repetition_penalty
        entry["penalty"] = params.presence_penalty + params.frequency_penalty * count

    def _entry(self, token_id: int) -> np.void:
        """The token's entry, to be written to; a new one if it has none."""
        place = self._place.setdefault(token_id, self._num_edits)
        if place == self._num_edits:
            if place == len(self._edits):
                self._edits = np.concatenate([self._edits, _neutral_edits(np.zeros(max(16, place), np.int32))])
            self._edits[place]["token"] = token_id
            self._num_edits += 1
        return self._edits[place]


class EditsOfRows:
    """Puts the edits of several sequences into one array, in memory that is used again in the next step."""

    def __init__(self):
        self._words = np.empty(0, np.int32)

    def join(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """All edits [n] LOGIT_EDIT, those in parts[i] with row i; valid until the next call."""
        num_edits = [len(part) for part in parts]
        num_words = sum(num_edits) * WORDS_PER_EDIT
        if num_words > len(self._words):
            self._words = np.empty(2 * num_words, np.int32)
        words = self._words[:num_words]
        if num_words:
            # As words, since NumPy would copy structs field by field.
            np.concatenate([part.view(np.int32) for part in parts], out=words)
        edits = words.view(LOGIT_EDIT)
        edits["row"] = np.repeat(np.arange(len(parts), dtype=np.int32), num_edits)
        return edits


def _without_prompt(processor: Callable[..., Array], prompt_token_ids: Sequence[int]) -> Callable[..., Array]:
    """It, as a function of the output's tokens and the logits; one that takes three arguments gets the prompt first."""
    try:
        num_parameters = len(inspect.signature(processor).parameters)
    except (TypeError, ValueError):  # some that are written in C don't tell
        num_parameters = 2
    return partial(processor, list(prompt_token_ids)) if num_parameters == 3 else processor


def _is_like(array, logits: Array) -> bool:
    return (
        type(array) is type(logits)
        and (array.shape, array.dtype) == (logits.shape, logits.dtype)
        and array.flags.c_contiguous
    )


def _describe(value) -> str:
    """Its type, and if it is an array its shape and dtype."""
    name = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    return " ".join([name, *(str(getattr(value, field)) for field in ("shape", "dtype") if hasattr(value, field))])


def _neutral_edits(token_ids: np.ndarray) -> np.ndarray:
    edits = np.zeros(len(token_ids), LOGIT_EDIT)
    edits["token"] = token_ids
    edits["repetition_penalty"] = 1
    return edits


def _bitmask(token_ids: Iterable[int], vocab_size: int) -> np.ndarray:
    bits = np.zeros(-(-vocab_size // 32) * 32, bool)
    bits[list(token_ids)] = True
    return np.packbits(bits, bitorder="little").view("<u4").astype(np.uint32)


def _token_sequences(words: Sequence[str], tokenizer) -> list[list[int]]:
    """How each word is spelled in tokens, at the start of a text and behind a space."""
    if words and tokenizer is None:
        raise ValueError("bad_words need a tokenizer; this engine has none")
    sequences = []
    for word in words:
        bare = word.lstrip(" ")
        texts = (bare, f" {bare}") if bare else (word,)
        spellings = [ids for text in texts if (ids := tokenizer.encode(text, add_special_tokens=False))]
        if not spellings:
            raise ValueError(f"bad_words: {word!r} has no tokens")
        sequences += [ids for ids in spellings if ids not in sequences]
    return sequences


def _check_token_ids(name: str, token_ids: Iterable[int], vocab_size: int) -> None:
    for token_id in token_ids:
        if token_id >= vocab_size:
            raise ValueError(f"{name}: token ids must be in [0, {vocab_size}); got {token_id}")
