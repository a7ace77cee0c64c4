"""A sequence's text as its tokens arrive, ended by stop strings wherever token borders fall."""

from __future__ import annotations

from copy import copy
from typing import Protocol


class TextDecoder(Protocol):
    def push(self, token_id: int) -> str:
        """The text that this token settles; bytes of an unfinished character are held back."""

    def flush(self) -> str:
        """What was held back, when no token follows."""

    def copy(self) -> TextDecoder:
        """Another one that goes on from here."""


class OutputText:
    """`text` grows by what is settled and never shrinks: no part of a stop string shows before it turns out not to
    become one, and nothing else is withheld.

    A stop string ends the text where its last character arrives; of several that end there, the longest counts.
    So the result doesn't depend on how the text is cut into tokens.

    decoder: turns tokens into text. stop: the stop strings. include_stop: keep the one that was found. min_tokens: a
    stop string whose last character comes with one of the first min_tokens tokens doesn't count.
    """

    def __init__(
        self, decoder: TextDecoder, stop: tuple[str, ...] = (), include_stop: bool = False, min_tokens: int = 0
    ):
        self.length = 0  # of the text, in characters
        self._pieces: list[str] = []  # which make the text: a token costs the same however long that is
        self._decoder = decoder
        self._stop = stop
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._held = ""  # the longest end of what was decoded that may become a stop string

    @property
    def text(self) -> str:
        if len(self._pieces) > 1:
            self._pieces = ["".join(self._pieces)]
        return self._pieces[0] if self._pieces else ""

    def after(self, start: int) -> str:
        """text[start:], at the cost of that part."""
        missing, pieces = self.length - start, self._pieces
        if missing <= 0:
            return ""
        if len(pieces[-1]) == missing:  # as for each token
            return pieces[-1]
        first = len(pieces) - 1
        while len(pieces[first]) < missing:
            missing -= len(pieces[first])
            first -= 1
        return "".join([pieces[first][-missing:], *pieces[first + 1 :]])

    def copy(self) -> OutputText:
        """Another one that goes on from here."""
        other = copy(self)
        other._pieces = [self.text]
        other._decoder = self._decoder.copy()
        return other

    def push(self, token_id: int) -> str | None:
        """Add a token; returns the stop string that it completes, if any, after which nothing may be added."""
        self._num_tokens += 1
        return self._add(self._decoder.push(token_id))

    def flush(self) -> str | None:
        """Settle everything, since no token follows; returns a stop string that shows up in the last bytes."""
        found = self._add(self._decoder.flush())
        self._settle(self._held)
        self._held = ""
        return found

    def _settle(self, piece: str) -> None:
        self._pieces.append(piece)
        self.length += len(piece)

    def _add(self, piece: str) -> str | None:
        if not self._stop:
            self._settle(piece)
            return None
        text = self._held + piece
        matches = []
        if self._num_tokens > self._min_tokens:
            for s in self._stop:
                # It must end in `piece`: what ended before came too early to count.
                start = text.find(s, max(0, len(self._held) - len(s) + 1))
                if start >= 0:
                    matches.append((start + len(s), start, s))
        if matches:
            end, start, found = min(matches)
            self._settle(text[:end] if self._include_stop else text[:start])
            self._held = ""
            return found
        held = self._longest_beginning_at_end(text)
        self._settle(text[: len(text) - held])
        self._held = text[len(text) - held :]
        return None

    def _longest_beginning_at_end(self, text: str) -> int:
        """The length of the longest end of `text` with which a stop string begins."""
        for length in range(min(len(text), max(map(len, self._stop)) - 1), 0, -1):
            if any(s.startswith(text[-length:]) for s in self._stop):
                return length
        return 0
