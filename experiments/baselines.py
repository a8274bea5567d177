"""What needs no network: bits per byte of held-out text by letter counts and by compressors."""

from __future__ import annotations

import gzip
import lzma

import numpy as np


def unigram(train: np.ndarray, valid: np.ndarray) -> float:
    """Bits per byte under the byte frequencies of the training text, each count plus one.

    Example:
        >>> a, b = np.frombuffer(b"ab" * 4000, np.uint8), np.frombuffer(b"aaab", np.uint8)
        >>> round(unigram(a, b), 1)
        1.0
    """
    counts = np.bincount(train, minlength=256) + 1.0
    bits = np.log2(counts.sum()) - np.log2(counts)
    return float(bits[valid].mean())


def gzip_alone(valid: np.ndarray) -> float:
    """Bits per byte of the held-out text compressed by gzip -9, which sees nothing else."""
    return 8 * len(gzip.compress(valid.tobytes(), 9)) / len(valid)


def xz_alone(valid: np.ndarray) -> float:
    """Bits per byte of the held-out text compressed by xz -6, which sees nothing else."""
    return 8 * _xz(valid.tobytes()) / len(valid)


def xz_after_training_text(train: np.ndarray, valid: np.ndarray) -> float:
    """Bits per byte that held-out text adds to the compressed training text: xz(t + v) - xz(t).

    The dictionary spans the whole text (up to 1 GiB), so every phrase of the training text can be
    copied. About a second per MB.
    """
    before, both = train.tobytes(), train.tobytes() + valid.tobytes()
    return 8 * (_xz(both) - _xz(before)) / len(valid)


def _xz(data: bytes) -> int:
    size = min(max(len(data), 1 << 16), 1 << 30)
    return len(
        lzma.compress(data, filters=[{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": size}])
    )


def all_baselines(train: np.ndarray, valid: np.ndarray) -> dict[str, float]:
    """The four numbers by name, cheapest first."""
    return {
        "unigram": unigram(train, valid),
        "gzip": gzip_alone(valid),
        "xz": xz_alone(valid),
        "xz after the training text": xz_after_training_text(train, valid),
    }
