"""Laws that are sums of powers, L = sum_j c_j prod_i x_i^(-p_ij), and their fit.

Chinchilla's law and the sparsity laws built on it have this shape; the constant is a term without
a power. Fitted in log space under a Huber loss, from many starts, as Hoffmann et al. do.

References: Hoffmann et al., Training compute-optimal large language models, 2022,
arXiv:2203.15556; Abnar et al., Parameters vs FLOPs: Scaling laws for optimal sparsity for
mixture-of-experts language models, 2025, arXiv:2501.12370.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import least_squares
from scipy.special import logsumexp

Terms = tuple[tuple[str, ...], ...]

CHINCHILLA: Terms = (("N",), ("D",), ())
"""a / N^alpha + b / D^beta + e."""

SPARSITY: Terms = (("N",), ("D",), ("1-S",), ("1-S", "N"), ())
"""a / N^alpha + b / D^beta + c / (1-S)^lambda + d / ((1-S)^delta N^gamma) + e."""


class Law(NamedTuple):
    """A fitted law.

    Attributes:
        terms: The variables of each term.
        scales: c_j, positive.
        powers: p_ij of each term, as many as it has variables.
        error: Root of the mean squared error of log L on the data of the fit.
    """

    terms: Terms
    scales: tuple[float, ...]
    powers: tuple[tuple[float, ...], ...]
    error: float

    def __call__(self, data: Mapping[str, np.ndarray]) -> np.ndarray:
        """L at the given variables, arrays of one shape.

        Example:
            >>> law = Law((("N",), ()), (6.0, 1.0), ((0.5,), ()), 0.0)
            >>> law({"N": np.array([4.0, 9.0])}).tolist()
            [4.0, 3.0]
        """
        shape = np.broadcast_shapes(*(np.shape(x) for x in data.values()))
        total = np.zeros(shape)
        for names, scale, powers in zip(self.terms, self.scales, self.powers, strict=True):
            factors = (np.asarray(data[n]) ** -p for n, p in zip(names, powers, strict=True))
            total = total + scale * math.prod(factors, start=np.ones(shape))
        return total

    def off(self, data: Mapping[str, np.ndarray], loss: np.ndarray) -> float:
        """Root of the mean squared error of log L elsewhere."""
        return float(np.sqrt(np.mean((np.log(self(data)) - np.log(loss)) ** 2)))


def fit_law(
    terms: Terms,
    data: Mapping[str, np.ndarray],
    loss: np.ndarray,
    *,
    starts: int = 32,
    seed: int = 0,
    delta: float = 1e-3,
) -> Law:
    """The law of these terms that is nearest to the data.

    Args:
        terms: Such as `SPARSITY`.
        data: Positive values of each variable, `[n]`.
        loss: Positive, `[n]`.
        starts: Random starts; the best result is kept.
        seed: Of the starts.
        delta: Residuals of log L beyond it count linearly.

    Returns:
        The law. Powers are between -2 and 2, those of a term's only variable N or D above 0.

    Raises:
        ValueError: If there are fewer points than coefficients, or a value is not positive.
    """
    loss = np.asarray(loss, float)
    count = sum(1 + len(names) for names in terms)
    if len(loss) < count:
        raise ValueError(f"{count} coefficients need as many points; got {len(loss)}.")
    for name, value in {"loss": loss, **data}.items():
        if not np.all((np.asarray(value) > 0) & np.isfinite(value)):
            raise ValueError(f"{name} must be positive and finite.")
    logs = {name: np.log(np.asarray(value, float)) for name, value in data.items()}
    # Centred, scale and power of a term hardly depend on each other.
    middle = {name: value.mean() for name, value in logs.items()}
    target = np.log(loss)

    def parts(theta: np.ndarray) -> list[tuple[float, np.ndarray]]:
        found, at = [], 0
        for names in terms:
            found.append((theta[at], theta[at + 1 : at + 1 + len(names)]))
            at += 1 + len(names)
        return found

    def term_logs(theta: np.ndarray) -> np.ndarray:
        rows = []
        for names, (scale, powers) in zip(terms, parts(theta), strict=True):
            row = np.full(len(target), scale)
            for name, power in zip(names, powers, strict=True):
                row = row - power * (logs[name] - middle[name])
            rows.append(row)
        return np.stack(rows)

    def residuals(theta: np.ndarray) -> np.ndarray:
        return logsumexp(term_logs(theta), axis=0) - target

    def jacobian(theta: np.ndarray) -> np.ndarray:
        rows = term_logs(theta)
        columns = []
        for names, share in zip(terms, np.exp(rows - logsumexp(rows, axis=0)), strict=True):
            columns += [share, *(-share * (logs[name] - middle[name]) for name in names)]
        return np.stack(columns, axis=1)

    low, high = _bounds(terms, target.mean())
    draws = np.random.default_rng(seed)
    best = None
    for _ in range(starts):
        begin = np.concatenate([_start(names, target.mean(), draws) for names in terms])
        found = least_squares(
            residuals,
            np.clip(begin, low + 1e-6, high - 1e-6),
            jac=jacobian,
            bounds=(low, high),
            loss="huber",
            f_scale=delta,
            x_scale="jac",
            ftol=1e-14,
            xtol=1e-12,
            gtol=1e-14,
            max_nfev=2000,
        )
        if best is None or found.cost < best.cost:
            best = found
    assert best is not None
    scales, powers = [], []
    for names, (scale, power) in zip(terms, parts(best.x), strict=True):
        shift = sum(p * middle[n] for n, p in zip(names, power, strict=True))
        scales.append(float(np.exp(scale + shift)))
        powers.append(tuple(float(p) for p in power))
    error = float(np.sqrt(np.mean(best.fun**2)))
    return Law(terms, tuple(scales), tuple(powers), error)


def _bounds(terms: Terms, level: float) -> tuple[np.ndarray, np.ndarray]:
    """Of the centred coefficients: a term is between e^-12 and e^2 of the mean loss."""
    low, high = [], []
    for names in terms:
        low.append(level - 12.0)
        high.append(level + 2.0)
        for _ in names:
            falls = len(names) == 1 and names[0] in ("N", "D")
            low.append(0.0 if falls else -2.0)
            high.append(2.0)
    return np.array(low), np.array(high)


def _start(names: Sequence[str], level: float, draws: np.random.Generator) -> np.ndarray:
    scale = level + draws.uniform(-4.0, 0.0)
    return np.concatenate([[scale], draws.uniform(0.05, 0.8, len(names))])
