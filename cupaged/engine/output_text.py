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
    """`text` grows by what is settled until that is taken: no part of a stop string shows before it turns out not to
    become one, and nothing else is withheld.

    A stop string ends the text where its last character arrives; of several that end there, the longest counts.
    So the result doesn't depend on how the text is cut into tokens.

    decoder: turns tokens into text. stop: the stop strings. include_stop: keep the one that was found. min_tokens: a
    stop string whose last character comes with one of the first min_tokens tokens doesn't count.
    """

    def __init__(
        self, decoder: TextDecoder, stop: tuple[str, ...] = (), include_stop: bool = False, min_tokens: int = 0
    ):
        self.num_tokens = 0
        self._pieces: list[str] = []  # which make the text: a token costs the same however long that is
        self._decoder = decoder
        self._stop = stop
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._held = ""  # the longest end of what was decoded that may become a stop string

    @property
    def text(self) -> str:
        """What is settled and has not been taken."""
        if len(self._pieces) > 1:
            self._pieces = ["".join(self._pieces)]
        return self._pieces[0] if self._pieces else ""

    def take(self) -> str:
        """The text since the last call, which is then forgotten."""
        pieces, self._pieces = self._pieces, []
        return "".join(pieces)  # of a single piece, as for each token, that itself

    def copy(self) -> OutputText:
        """Another one that goes on from here."""
        other = copy(self)
        other._pieces = [self.text]
        other._decoder = self._decoder.copy()
        return other

    def push(self, token_id: int) -> str | None:
        """Add a token; returns the stop string that it completes, if any, after which nothing may be added."""
        self.num_tokens += 1
        piece = self._decoder.push(token_id)
        if self._stop:
            return self._add(piece)
        self._pieces.append(piece)  # as _add would, but at once
        return None

    def flush(self) -> str | None:
        """Settle everything, since no token follows; returns a stop string that shows up in the last bytes."""
        found = self._add(self._decoder.flush())
        self._pieces.append(self._held)
        self._held = ""
        return found

    def _add(self, piece: str) -> str | None:
        text = self._held + piece
        matches = []
        if self.num_tokens > self._min_tokens:
            for s in self._stop:
                # It must end in `piece`: what ended before came too early to count.
                start = text.find(s, max(0, len(self._held) - len(s) + 1))
                if start >= 0:
                    matches.append((start + len(s), start, s))
        if matches:
            end, start, found = min(matches)
            self._pieces.append(text[:end] if self._include_stop else text[:start])
            self._held = ""
            return found
        held = self._longest_beginning_at_end(text)
        self._pieces.append(text[: len(text) - held])
        self._held = text[len(text) - held :]
        return None

    def _longest_beginning_at_end(self, text: str) -> int:
        """The length of the longest end of `text` with which a stop string begins."""
        for length in range(min(len(text), max(map(len, self._stop), default=0) - 1), 0, -1):
            if any(s.startswith(text[-length:]) for s in self._stop):
                return length
        return 0
