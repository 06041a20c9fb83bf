"""Shuffle a range of numbers without storing the shuffled order."""

import math
import struct
from hashlib import blake2b

_ROUNDS = 8


class Permutation:
    """A pseudo-random permutation of the numbers from 0 to `size` - 1, evaluated one number at a time.

    A Feistel network (Luby and Rackoff, SIAM Journal on Computing 17(2), 1988) permutes the cells of a table with at
    least `size` cells, with BLAKE2b as its round function. A result that is not below `size` is permuted again
    until it is below `size` (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002).

    Args:
        size: how many numbers to permute, at least 1.
        key: text that selects the permutation.
    """

    def __init__(self, size: int, key: str) -> None:
        self._size = size
        self._columns = math.isqrt(size - 1) + 1
        self._rows = -(-size // self._columns)
        self._key = blake2b(key.encode()).digest()

    def __call__(self, number: int) -> int:
        """Return the number at position `number` in the shuffled order."""
        number = self._permute(number)
        while number >= self._size:
            number = self._permute(number)
        return number

    def _permute(self, number: int) -> int:
        row, column = divmod(number, self._columns)
        for round_ in range(0, _ROUNDS, 2):
            row = (row + self._hash(round_, column)) % self._rows
            column = (column + self._hash(round_ + 1, row)) % self._columns
        return row * self._columns + column

    def _hash(self, round_: int, digit: int) -> int:
        digest = blake2b(struct.pack("<QQ", round_, digit), digest_size=8, key=self._key).digest()
        return int.from_bytes(digest, "little")
