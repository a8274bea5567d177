"""From which density on zeros and formats save time, as measured on each kind of device."""

from __future__ import annotations

import functools
import importlib.resources
import json
import logging
import math
from typing import Any, NamedTuple

import jax

log = logging.getLogger("jaxsparse")


@functools.cache
def break_even() -> dict[str, Any]:
    """Device kind -> pattern or format -> density up to which it is faster than dense there.

    Measured by `experiments/bench_break_even.py`; 0 means that it never was. Stored blocks have
    figures for each size of block.
    """
    text = importlib.resources.files("jaxsparse").joinpath("break_even.json").read_text()
    return json.loads(text)


class Limits(NamedTuple):
    """What was measured of stored blocks of one size.

    Attributes:
        faster: Largest density at which `x @ w` is faster than with a dense weight.
        dense_above: Density above which `x @ w` and its gradients are slower than with the dense
            weight made from the blocks.
    """

    faster: float
    dense_above: float


def block_limits(block: tuple[int, int], device: str | None = None) -> Limits | None:
    """Limits of the largest measured block that fits into `block`; None where there is none.

    Args:
        block: (bk, bn).
        device: Kind of device (`jax.Device.device_kind`); default: the first.
    """
    device = jax.devices()[0].device_kind if device is None else device
    sizes = break_even().get(device, {}).get("BlockSparse", {}).get("blocks", {})
    fitting = [int(size) for size in sizes if int(size) <= min(block)]
    if not fitting:
        return None
    found = sizes[str(max(fitting))]
    return Limits(found["density"], found["dense_above"])


def goes_dense(
    block: tuple[int, int], slots: int, grid: tuple[int, int], dense_above: float | None
) -> bool:
    """Whether `x @ w` is to make the dense weight, because too many blocks are stored.

    Args:
        block: (bk, bn).
        slots: Blocks that can be stored: what a product costs, known without looking at the device.
        grid: (R, C).
        dense_above: Density above which to do so; if None, what was measured on this device, and
            never where nothing was.
    """
    density = slots / max(math.prod(grid), 1)
    if dense_above is not None:
        return density > dense_above
    limits = block_limits(block)
    if limits is None or density <= limits.dense_above:
        return False
    _say(block, limits.dense_above, jax.devices()[0].device_kind)
    return True


@functools.cache
def _say(block: tuple[int, int], limit: float, device: str) -> None:
    """Once for each size of block."""
    log.warning(
        "a weight stores more than %.0f %% of its blocks of %d x %d: measured on %s, training is "
        "then faster with the dense weight, which x @ w makes for each product. dense_above=1 "
        "keeps to the stored blocks, another number moves the limit.",
        100 * limit,
        *block,
        device,
    )
