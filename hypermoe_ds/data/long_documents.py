"""Encode a long document in overlapping windows. The token ids equal those of the whole document encoded at once.

Two consecutive windows are joined at a token boundary that both windows contain. A tokenizer first splits the text
into words, from left to right, and then encodes each word. The words after a split depend only on the text after it, so
joining two windows at a common split gives exactly the tokens of the document.

Some tokenizers split only at spaces or not at all, so a word can be longer than the overlap. If the model is BPE, the
windows are joined inside such a word. In BPE, a sequence of tokens is the encoding of a word if and only if every two
adjacent tokens are the encoding of their text. The tokens before a boundary therefore do not depend on the tokens after
it.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

WINDOW = 1 << 18  # characters
_OVERLAP = 1 << 12  # characters


@dataclass(frozen=True)
class _Window:
    """The tokens of a part of a document.

    Attributes:
        ids: token ids [N].
        starts: offset of each token in the document, in characters [N].
        ends: offset of the end of each token [N].
        words: index of the word that each token belongs to [N].
        text: text of the window.
        offset: offset of the window in the document.
    """

    ids: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]
    words: npt.NDArray[np.int64]
    text: str
    offset: int

    @property
    def end(self) -> int:
        """Offset of the end of the window in the document."""
        return self.offset + len(self.text)

    def between(self, low: int, high: int) -> range:
        """Return the indices of the tokens that start at an offset in [low, high], except token 0."""
        first, end = np.searchsorted(self.starts, low), np.searchsorted(self.starts, high, "right")
        return range(max(1, int(first)), int(end))

    def token(self, index: int) -> tuple[int, int, int]:
        """Return the id, start and end of a token."""
        return int(self.ids[index]), int(self.starts[index]), int(self.ends[index])


class LongEncoder:
    """Encode long documents window by window, in bounded memory.

    Args:
        tokenizer: a `tokenizers.Tokenizer`.
        window: number of new characters per window.
        overlap: number of characters that consecutive windows share.
    """

    def __init__(self, tokenizer: Any, window: int = WINDOW, overlap: int = _OVERLAP) -> None:
        self._tokenizer = tokenizer
        self._window, self._overlap = window, overlap
        self._joins_inside_words = _is_plain_bpe(tokenizer)

    def encode(self, pieces: Iterable[str]) -> Iterator[npt.NDArray[np.int64]]:
        """Yield the token ids of a document whose text is given in pieces of any length.

        The peak memory is about 200 bytes per character of a window. If a word is longer than the overlap, two windows
        may have no common boundary. The two are then encoded as one window.
        """
        previous, begin = None, 0
        for part in _parts(pieces, self._window):
            if previous is None:
                previous = self._encode(part, 0)
                continue
            window = self._encode(previous.text[-self._overlap :] + part, max(previous.end - self._overlap, 0))
            join = self._join(previous, window) or self._join(
                previous, window := self._from_boundary(previous, part, window.offset)
            )
            if join is None:
                previous = self._encode(previous.text + part, previous.offset)
                continue
            left, right = join
            yield previous.ids[begin:left]
            previous, begin = window, right
        if previous is not None:
            yield previous.ids[begin:]

    def _encode(self, text: str, offset: int) -> _Window:
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2) + offset
        words = np.array([-1 if word is None else word for word in encoding.word_ids], dtype=np.int64)
        ids = np.array(encoding.ids, dtype=np.int64)
        return _Window(ids, offsets[:, 0], offsets[:, 1], words, text, offset)

    def _from_boundary(self, previous: _Window, part: str, offset: int) -> _Window:
        """Encode a window that begins at a token boundary of the previous window, near `offset`.

        In a long run of equal characters, the tokens of a window depend on where the window begins. A window that
        begins elsewhere may therefore have no common boundary with the previous window.
        """
        end = int(np.searchsorted(previous.starts, offset, "right"))
        first = int(np.searchsorted(previous.starts, offset - self._overlap))
        boundaries = [
            index for index in range(max(1, first), end) if previous.ends[index - 1] <= previous.starts[index]
        ]
        cuts = [index for index in boundaries if previous.words[index] != previous.words[index - 1]]
        begin = int(previous.starts[(cuts or boundaries)[-1]]) if boundaries else offset
        return self._encode(previous.text[begin - previous.offset :] + part, begin)

    def _join(self, left: _Window, right: _Window) -> tuple[int, int] | None:
        """Find a common boundary, at which `left.ids[:i]` and `right.ids[j:]` can be joined.

        The tokens on both sides of the boundary must be equal. Tokens near the end of `left` or the start of `right`
        can differ from those of the document, so only the middle half of the overlap is used.

        Returns:
            The indices i and j, or None if there is no common boundary.
        """
        quarter = (left.end - right.offset) // 4
        low, high = right.offset + quarter, left.end - quarter
        boundaries = {int(right.starts[j]): j for j in right.between(low, high) if right.ends[j - 1] <= right.starts[j]}
        best = None
        for i in left.between(low, high):
            j = boundaries.get(int(left.starts[i]))
            if j is None or left.token(i) != right.token(j) or left.token(i - 1) != right.token(j - 1):
                continue
            distance = abs(int(left.starts[i]) - (low + high) // 2)
            if self._is_exact(left, i, right, j) and (best is None or distance < best[0]):
                best = (distance, i, j)
        return None if best is None else best[1:]

    def _is_exact(self, left: _Window, i: int, right: _Window, j: int) -> bool:
        """Return whether a common boundary is between two words, or in a BPE word that begins before the overlap."""
        between_left = bool(left.words[i] != left.words[i - 1])
        between_right = bool(right.words[j] != right.words[j - 1])
        if between_left or between_right:
            return between_left and between_right
        first = int(np.searchsorted(left.words, left.words[i]))
        begins_before = bool(left.starts[first] <= right.offset and right.words[j] == right.words[0])
        return begins_before and self._joins_inside_words


def _is_plain_bpe(tokenizer: Any) -> bool:
    """Return whether the tokenizer's model is BPE without subword prefixes, word suffixes or dropout.

    Only in such a model do the tokens of a word not depend on where the word begins and ends. With `ignore_merges`, a
    word in the vocabulary is always one token, but such words are shorter than the overlap.
    """
    from tokenizers import models  # noqa: PLC0415 (takes a second; the module is imported by train.py)

    model = tokenizer.model
    return (
        isinstance(model, models.BPE)
        and not model.continuing_subword_prefix
        and not model.end_of_word_suffix
        and not model.dropout
    )


def _parts(pieces: Iterable[str], size: int) -> Iterator[str]:
    """Regroup pieces of a text into parts of `size` characters; the last part may be shorter."""
    waiting: list[str] = []
    length = 0
    for piece in pieces:
        waiting.append(piece)
        length += len(piece)
        if length >= size:
            text = "".join(waiting)
            end = length - length % size
            yield from (text[start : start + size] for start in range(0, end, size))
            waiting, length = [text[end:]], length - end
    if length:
        yield "".join(waiting)
