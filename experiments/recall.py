"""Associative recall with many queries, made on the fly: records scattered in a long noise.

A record is one token that holds a key and a value; the last tokens of the sequence ask for the keys
of all records, in random order, and the answer to each is its value. So one layer of attention can
do it if it reaches the record, and nothing else can: whoever does not guesses one of the values.

References: Arora et al., Zoology: Measuring and Improving Recall in Efficient Language Models,
2023, arXiv:2312.04927 (there a key and its value are two tokens, which takes two layers).
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np


class Problem(NamedTuple):
    """A batch of problems.

    Attributes:
        tokens: int32 `[B, T]`.
        targets: int32 `[B, T]`: the answer where a query stands, -1 elsewhere.
        distance: int32 `[B, pairs]`: tokens between each query and its record, in query order.
    """

    tokens: np.ndarray
    targets: np.ndarray
    distance: np.ndarray


@dataclasses.dataclass(frozen=True)
class Recall:
    """The task.

    Attributes:
        keys: Different keys.
        values: Different values; who guesses is right once in so many.
        pairs: Records and queries in a sequence, each of another key; at most `keys`.
        noise: Different noise tokens.

    Example:
        >>> task = Recall(keys=2, values=2, pairs=2, noise=1)
        >>> tokens, targets, distance = task.problem(8, 1, seed=0, step=0)
        >>> tokens.tolist(), targets.tolist(), distance.tolist()
        ([[0, 0, 6, 8, 0, 0, 2, 1]], [[-1, -1, -1, -1, -1, -1, 4, 4]], [[3, 5]])
    """

    keys: int = 8
    values: int = 8
    pairs: int = 8
    noise: int = 8

    @property
    def vocab(self) -> int:
        """Noise, keys as queries, values as answers, records."""
        return self.noise + self.keys + self.values + self.keys * self.values

    def problem(self, tokens: int, batch: int, *, seed: int, step: int) -> Problem:
        """The batch of a step: a function of seed and step alone.

        Raises:
            ValueError: If the records and queries do not fit into so many tokens.
        """
        if self.pairs > self.keys or tokens < 2 * self.pairs:
            raise ValueError(
                f"recall needs pairs <= keys and tokens >= 2 pairs; got pairs={self.pairs}, "
                f"keys={self.keys}, tokens={tokens}."
            )
        random, p = np.random.default_rng((seed, step)), self.pairs
        end = tokens - p

        def distinct(high: int) -> np.ndarray:
            """Different numbers below `high`, [batch, pairs]."""
            return random.permuted(np.tile(np.arange(high), (batch, 1)), axis=1)[:, :p]

        at, key, order = distinct(end), distinct(self.keys), distinct(p)
        value = random.integers(self.values, size=(batch, p))
        first_value = self.noise + self.keys
        x = random.integers(self.noise, size=(batch, tokens))
        record = first_value + self.values + key * self.values + value
        np.put_along_axis(x, at, record, 1)
        ask, answer, where = (np.take_along_axis(a, order, 1) for a in (key, value, at))
        x[:, end:] = self.noise + ask
        targets = np.full((batch, tokens), -1)
        targets[:, end:] = first_value + answer
        distance = np.arange(end, tokens) - where
        return Problem(*(a.astype(np.int32) for a in (x, targets, distance)))
