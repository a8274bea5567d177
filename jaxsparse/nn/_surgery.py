"""Replace layers of a flax.nnx model by path."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from flax import nnx

from jaxsparse import _tree
from jaxsparse.nn._sparse_linear import SparseLinear

Where = str | Callable[[str, Any], bool]


def replace(model: nnx.Module, where: Where, make: Callable[[str, Any], nnx.Module]) -> nnx.Module:
    """Put other modules in the place of those that `where` selects; changes the model in place.

    A module that stands in several places is replaced by one module in all of them.

    Args:
        model: Any NNX model.
        where: Glob matched against the whole path (`layers/0/up`), or (path, module) -> bool.
        make: (path, module) -> the module to put there.

    Returns:
        The model.

    Raises:
        ValueError: If nothing is selected; names near paths.

    Example:
        >>> import jaxsparse as jsp
        >>> from flax import nnx
        >>> model = nnx.Sequential(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), nnx.relu)
        >>> type(jsp.nn.replace(model, "layers/0", lambda path, old: nnx.BatchNorm(
        ...     2, rngs=nnx.Rngs(0))).layers[0]).__name__
        'BatchNorm'
    """
    return _replace(model, where, make, nnx.Module)


def _replace(model: nnx.Module, where: Where, make: Callable[..., Any], kind: Any) -> nnx.Module:
    places = [place for place in _places(model, "", ()) if isinstance(place[-1], kind)]
    chosen = [place for place in places if _tree.matches(where, place[0], place[-1])]
    if not chosen:
        raise _tree.unmatched(where, [path for path, *_ in places], "where")
    made: dict[int, Any] = {}
    for path, *_, module in chosen:
        if id(module) not in made:
            made[id(module)] = make(path, module)
    for _, parent, name, module in places:
        if id(module) not in made:
            continue
        if isinstance(parent, nnx.List):
            parent[name] = made[id(module)]
        else:
            setattr(parent, name, made[id(module)])
    return model


def _places(parent: Any, prefix: str, above: tuple[int, ...]) -> Iterator[tuple]:
    """(path, parent, name, module) of every place at which a module stands."""
    children = enumerate(parent) if isinstance(parent, nnx.List) else vars(parent).items()
    for name, child in list(children):
        if isinstance(child, nnx.Module) and id(child) not in above:
            path = f"{prefix}{name}"
            yield path, parent, name, child
            yield from _places(child, f"{path}/", (*above, id(parent)))


def sparse_linears(
    model: nnx.Module, where: Where = "*", *, block: tuple[int, int], density: float
) -> nnx.Module:
    """Put a `SparseLinear` in the place of every `nnx.Linear` that `where` selects, in place.

    Each keeps the blocks of largest magnitude, and its bias.

    Args:
        model: Any NNX model.
        where: Glob or (path, module) -> bool, asked about `nnx.Linear` only; all of them if not
            given.
        block: (bk, bn), which divide every kernel.
        density: Share of blocks stored, in (0, 1].

    Returns:
        The model.

    Raises:
        ValueError: If there is nothing to replace, or blocks do not divide a kernel; names the
            path. Nothing is replaced then.

    Example:
        >>> import jaxsparse as jsp
        >>> from flax import nnx
        >>> model = nnx.Sequential(nnx.Linear(32, 64, rngs=nnx.Rngs(0)), nnx.relu)
        >>> model = jsp.nn.sparse_linears(model, block=(16, 16), density=0.5)
        >>> model.layers[0].weight.shape, float(model.layers[0].weight.density)
        ((32, 64), 0.5)
    """

    def make(path: str, linear: nnx.Linear) -> SparseLinear:
        try:
            return SparseLinear.from_linear(linear, block=block, density=density)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    return _replace(model, where, make, nnx.Linear)
