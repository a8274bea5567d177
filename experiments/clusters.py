"""Pieces of text in clusters of equal size, by the words they use.

tf-idf of words, its leading singular vectors, k-means whose clusters all have the same number of
pieces, and how likely each cluster is for a context.

Reference: Gururangan et al., Scaling expert language models with unsupervised domain discovery,
2023, arXiv:2303.14177.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_matrix
from scipy.sparse.linalg import svds

WORDS = 4000  # of the vocabulary, the most frequent


class Clusters(NamedTuple):
    """What places a text among clusters.

    Attributes:
        words: Word -> column.
        idf: Weight of each word, `[V]`.
        directions: Singular vectors, `[V, d]`.
        centres: `[C, d]`, of the vectors of length one that `embed` gives.
    """

    words: dict[str, int]
    idf: np.ndarray
    directions: np.ndarray
    centres: np.ndarray

    def embed(self, texts: Sequence[bytes]) -> np.ndarray:
        """`[n, d]`, each of length one; zeros for a text without a known word."""
        return _unit((_counted(texts, self.words) @ _diagonal(self.idf)) @ self.directions)

    def likely(self, texts: Sequence[bytes], *, temperature: float, top: int) -> np.ndarray:
        """p(cluster | text) ~ exp(-distance^2 / temperature) over the `top` nearest, `[n, C]`."""
        if not (1 <= top <= len(self.centres) and temperature > 0):
            raise ValueError(
                f"needs 1 <= top <= {len(self.centres)} clusters and temperature > 0; got {top} "
                f"and {temperature}."
            )
        distance = _squared(self.embed(texts), self.centres)
        order = np.argsort(distance, axis=1, kind="stable")
        near = np.zeros_like(distance, bool)
        np.put_along_axis(near, order[:, :top], True, 1)
        score = np.where(near, -(distance - distance.min(1, keepdims=True)) / temperature, -np.inf)
        score = np.exp(score)
        return score / score.sum(1, keepdims=True)


def fit_clusters(
    texts: Sequence[bytes], count: int, *, dimensions: int = 32, rounds: int = 20, seed: int = 0
) -> tuple[Clusters, np.ndarray]:
    """Clusters of equal size, up to one piece.

    Args:
        texts: n pieces.
        count: C, clusters.
        dimensions: d, at most; less where there are few words or pieces.
        rounds: Of k-means, at most.
        seed: Of the first centres.

    Returns:
        The clusters, and the cluster of each piece, int `[n]`.

    Raises:
        ValueError: If there are fewer pieces than clusters, or no words.
    """
    if not 1 <= count <= len(texts):
        raise ValueError(f"needs 1 <= clusters <= {len(texts)} pieces; got {count}.")
    found = [Counter(_words(text)) for text in texts]
    documents = Counter(word for counter in found for word in counter)
    # What stands in every piece says nothing, what stands in one joins nothing.
    useful = [(n, w) for w, n in documents.items() if 1 < n < len(texts)]
    words = {w: i for i, (_, w) in enumerate(sorted(useful, key=lambda x: (-x[0], x[1]))[:WORDS])}
    if len(words) < 2:
        raise ValueError("the pieces share no words; give longer ones.")
    idf = np.log(len(texts) / np.array([documents[word] for word in words]))
    table = _counted(texts, words) @ _diagonal(idf)
    size = min(dimensions, min(table.shape) - 1)
    begin = np.random.default_rng(seed).normal(size=min(table.shape))
    _, strength, right = svds(table, k=size, v0=begin)
    directions = right[strength > 1e-9].T
    clusters = Clusters(words, idf, directions, np.zeros((count, directions.shape[1])))
    points = clusters.embed(texts)
    centres, groups = _balanced_kmeans(points, count, rounds, np.random.default_rng(seed))
    return clusters._replace(centres=centres), groups


def balanced(distance: np.ndarray) -> np.ndarray:
    """Clusters of n pieces by distance [n, C]: nearest pairs first, ceil(n / C) or fewer in each.

    At most n mod C clusters take the larger number, so sizes differ by one.
    """
    n, count = distance.shape
    room, larger = np.full(count, n // count), n % count
    groups = np.full(n, -1)
    for pair in np.argsort(distance, axis=None, kind="stable"):
        piece, cluster = divmod(int(pair), count)
        if groups[piece] >= 0:
            continue
        if room[cluster] == 0 and larger > 0:
            larger -= 1
            room[cluster] -= 1  # the one extra place: -1 is full for good
            groups[piece] = cluster
        elif room[cluster] > 0:
            room[cluster] -= 1
            groups[piece] = cluster
    return groups


def _balanced_kmeans(points, count, rounds, draws):
    """Lloyd's rounds with balanced groups; first centres as in k-means++."""
    centres = points[[draws.integers(len(points))]]
    while len(centres) < count:
        far = _squared(points, centres).min(1)
        share = far / far.sum() if far.sum() > 0 else np.full(len(points), 1 / len(points))
        centres = np.concatenate([centres, points[[draws.choice(len(points), p=share)]]])
    groups = balanced(_squared(points, centres))
    for _ in range(rounds):
        centres = np.stack([points[groups == c].mean(0) for c in range(count)])
        moved = balanced(_squared(points, centres))
        if np.array_equal(moved, groups):
            break
        groups = moved
    return centres, groups


def _words(text: bytes) -> list[str]:
    return re.findall(r"[a-z]+", text.decode(errors="replace").lower())


def _counted(texts: Sequence[bytes], words: dict[str, int]) -> csr_matrix:
    rows, columns = [], []
    for number, text in enumerate(texts):
        known = [words[word] for word in _words(text) if word in words]
        rows += [number] * len(known)
        columns += known
    shape = (len(texts), len(words))
    return csr_matrix((np.ones(len(rows)), (rows, columns)), shape=shape)


def _diagonal(values: np.ndarray) -> csr_matrix:
    at = np.arange(len(values))
    return csr_matrix((values, (at, at)))


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def _squared(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    return ((points[:, None] - centres) ** 2).sum(-1)
