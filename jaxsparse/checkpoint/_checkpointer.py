"""Save in the background, restore the newest sound checkpoint: orbax between folders and leaves."""

from __future__ import annotations

import json
import operator
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from jaxsparse._tree import paths
from jaxsparse.checkpoint import _folders, _leaves

Tree = Any

_ITEMS = ("params", "opt_state", "masks")
_VERSIONS = ("jax", "jaxlib", "numpy", "optax", "flax", "orbax-checkpoint")


class Restored(NamedTuple):
    """What `Checkpointer.restore` returns; `opt_state` is None where no template was given."""

    step: int
    params: Tree
    opt_state: Tree
    data: Any


class Checkpointer:
    """Saves a training state in the background; restores the newest sound one, bit for bit.

    Killed at any moment, a run loses the steps since its last finished save and nothing else.

    Args:
      directory: of this run alone; a local path or a bucket, `gs://...`. Made if missing.
      config: what the state depends on (model, optimizer, plan), JSON-able; saved, and compared:
        checkpoints of another config are refused here, before any work is lost. None takes over
        the saved one: build the templates for `restore` from the attribute `config`.
      keep: how many sound checkpoints stay, at least 1. A damaged one does not count; it goes when
        `keep` newer sound ones are there.

    Raises:
      ValueError: the directory has checkpoints of another config; says what differs.

    Example:
      >>> import tempfile
      >>> params, opt_state = {"w": jnp.ones((2, 3))}, {"mu": jnp.zeros((2, 3))}
      >>> with Checkpointer(tempfile.mkdtemp(), config={"width": 3}) as checkpointer:
      ...     checkpointer.save(40, params=params, opt_state=opt_state, data={"position": 1280})
      ...     restored = checkpointer.restore(params, opt_state)
      >>> restored.step, restored.data["position"], restored.params["w"].shape
      (40, 1280, (2, 3))

    Cost: `save` blocks until the arrays are on the host, and until an earlier save has ended; one
    host copy lives while the background writes and hashes it. `restore` reads every file twice.
    Disk: `keep` + 1 states. What earlier processes left is hashed once, before the first removal.
    """

    def __init__(self, directory: Any, *, config: dict | None = None, keep: int = 3) -> None:
        if keep < 1:
            raise ValueError(f"keep must be at least 1; got {keep}.")
        self._directory, self._keep = _path(directory), keep
        self.config = json.loads(json.dumps(config))
        self._sound: set[str] = set()  # written or already hashed by this process
        self._running: str | None = None
        folders = _folders.folders(self._directory)
        self._next = folders[0].order + 1 if folders else 0
        for folder in folders:
            manifest, fault = _folders.inspect(folder, ())
            if not fault:
                self._check_config(folder.path, manifest["config"])
                break
        self._directory.mkdir(parents=True, exist_ok=True)
        # With asynchronous directories an interrupted save() leaves a thread that waits for them.
        options = ocp.AsyncOptions(create_directories_asynchronously=False)
        self._handler = _Handler(composite_options=ocp.CompositeOptions(async_options=options))
        self._orbax = ocp.AsyncCheckpointer(self._handler, async_options=options)

    def save(
        self,
        step: int,
        *,
        params: Tree,
        opt_state: Tree = None,
        masks: Tree = None,
        data: Any = None,
    ) -> None:
        """Start to save. What is given may be donated or changed as soon as this returns.

        Args:
          step: steps done, >= 0. A step may be saved again; the later save is the newest.
          params: tree of arrays of any dtype and sharding, typed PRNG keys, numbers.
          opt_state: likewise.
          masks: tree of bools, `jsp.masks(opt_state)`; what `restore_masks` will read.
          data: position in the data and whatever else the run needs, JSON-able.

        Raises:
          TypeError: a leaf that is not an array or a number, a mask that is not bool, or data that
            JSON does not know; nothing was written.
          Exception: whatever stopped the save before this one, for example a full disk.
        """
        step = operator.index(step)
        if step < 0:
            raise ValueError(f"step must be at least 0; got {step}.")
        leaves = {"params": _leaves.leaves(params), "opt_state": _leaves.leaves(opt_state)}
        masks = _leaves.leaves(masks)
        about = {
            "step": step,
            "data": json.loads(json.dumps(data)),
            "config": self.config,
            "versions": {name: version(name) for name in _VERSIONS},
            "leaves": {item: _leaves.specs(named) for item, named in leaves.items()},
            "weak": {
                item: [name for name in named if _leaves.is_weak(named[name])]
                for item, named in leaves.items()
            },
            "masks": {name: np.shape(mask) for name, mask in masks.items()},
        }
        leaves["masks"] = {name: _leaves.pack(name, mask) for name, mask in masks.items()}
        self.wait()
        items = {}
        for item, named in leaves.items():
            # Orbax takes no array of size 0 and no empty tree; `about` has their shapes.
            stored = {n: _leaves.encode(leaf) for n, leaf in named.items() if np.size(leaf)}
            if stored:
                items[item] = ocp.args.StandardSave(stored)
        self._handler.about = about
        name = _folders.folder_name(self._next, step)
        self._next += 1
        self._orbax.save(self._directory / name, args=_Items(**items))
        self._running = name

    def restore(
        self, like_params: Tree, like_opt_state: Tree = None, step: int | None = None
    ) -> Restored | None:
        """The newest sound checkpoint, or None where no save has ever finished.

        What was cut off or damaged is passed over with a warning that names the file.

        Args:
          like_params: tree with the types, shapes and dtypes wanted, real or from `jax.eval_shape`.
            A leaf with a sharding gets it; any other goes, uncommitted, to the default device; a
            numpy leaf stays numpy.
          like_opt_state: likewise; None leaves the optimizer unread.
          step: this step and no other.

        Raises:
          ValueError: another config, or a template with another path, shape or dtype.
          RuntimeError: there are checkpoints, and none is sound.
        """
        self.wait()
        like = {"params": like_params, "opt_state": like_opt_state}
        wanted = tuple(item for item in like if like[item] is not None)
        found = _folders.find(self._directory, wanted, step)
        if found is None:
            return None
        path, manifest = found
        self._check_config(path, manifest["config"])
        trees = dict.fromkeys(like)
        for item in wanted:
            leaves = _leaves.leaves(like[item])
            _same(path, item, manifest["leaves"][item], _leaves.specs(leaves))
            read = _read(path, item, leaves, manifest["weak"][item])
            trees[item] = jax.tree.unflatten(jax.tree.structure(like[item]), read.values())
        return Restored(step=manifest["step"], data=manifest["data"], **trees)

    def latest_step(self) -> int | None:
        """The step of the newest sound checkpoint, or None. Hashes all its files."""
        self.wait()
        found = _folders.find(self._directory, _ITEMS)
        return found and found[1]["step"]

    def wait(self) -> None:
        """Wait for the running save, raise what stopped it, remove what is too old."""
        running, self._running = self._running, None
        self._orbax.wait_until_finished()
        if running is None:
            return
        self._sound.add(running)
        folders, sound = _folders.folders(self._directory), 0
        if jax.process_index() != 0 or len(folders) <= self._keep:
            return
        for folder in folders:
            name = folder.path.name
            if sound == self._keep or (sound and not folder.whole):
                folder.path.rmtree(missing_ok=True)
            elif not _folders.inspect(folder, _ITEMS, digests=name not in self._sound)[1]:
                self._sound.add(name)
                sound += 1

    def close(self) -> None:
        """Wait, and free the threads; a `with` block does so at its end."""
        try:
            self.wait()
        finally:
            self._orbax.close()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _check_config(self, path: epath.Path, saved: Any) -> None:
        if self.config is None:
            self.config = saved
        elif saved is not None:
            _same(path, "config", _leaves.leaves(saved), _leaves.leaves(self.config))


def restore_masks(directory: Any, step: int | None = None, *, like: Tree = None) -> Tree:
    """The masks of the newest sound checkpoint, without its params and optimizer.

    Args:
      directory: as given to `Checkpointer`.
      step: this step instead of the newest.
      like: params, real or abstract: the result then has their structure.

    Returns:
      `{path: numpy bool array}`, True = kept, each of the shape it was saved with; with `like` a
      tree of jax arrays.

    Raises:
      FileNotFoundError: no save has ever finished there.
      ValueError: saved without masks, or `like` has other paths.
      RuntimeError: there are checkpoints, and none has sound masks.

    Example:
      >>> import tempfile
      >>> directory, masks = tempfile.mkdtemp(), {"w": jnp.array([True, False, True])}
      >>> with Checkpointer(directory) as checkpointer:
      ...     checkpointer.save(1, params={"w": jnp.ones(3)}, masks=masks)
      >>> restore_masks(directory)
      {'w': array([ True, False,  True])}

    Cost: reads and hashes at most 1 bit a weight.
    """
    found = _folders.find(_path(directory), ("masks",), step)
    if found is None:
        raise FileNotFoundError(f"No save has ever finished in {directory}: no checkpoint there.")
    path, shapes = found[0], found[1]["masks"]
    if not shapes:
        raise ValueError(f"{path} has no masks. Pass masks=jsp.masks(opt_state) to save.")
    packed = {name: _leaves.packed_like(shape) for name, shape in shapes.items()}
    masks = {
        name: _leaves.unpack(bits, shapes[name])
        for name, bits in _read(path, "masks", packed).items()
    }
    if like is None:
        return masks
    _same(path, "tree", dict.fromkeys(masks, "a leaf"), dict.fromkeys(paths(like), "a leaf"))
    placed = [jnp.asarray(masks[name]) for name in paths(like)]
    return jax.tree.unflatten(jax.tree.structure(like), placed)


class _Handler(ocp.CompositeCheckpointHandler):
    """Writes the manifest when the arrays are there and orbax has not yet renamed the folder."""

    about: _folders.Manifest

    def finalize(self, directory: epath.Path) -> None:
        super().finalize(directory)
        _folders.write_manifest(directory, self.about, _ITEMS)


@ocp.args.register_with_handler(_Handler, for_save=True, for_restore=True)
class _Items(ocp.args.Composite):
    """What the handler is given, by item."""


def _path(directory: Any) -> epath.Path:
    return epath.Path(directory).expanduser().resolve()


def _read(
    path: epath.Path, item: str, like: dict[str, Any], weak: Sequence[str] = ()
) -> dict[str, Any]:
    """The stored leaves, each as its template; `weak` names the weakly typed."""
    targets = {name: _leaves.target(leaf, name in weak) for name, leaf in like.items()}
    # What has no elements is not stored: it is its target.
    if stored := {name: target for name, target in targets.items() if np.size(target)}:
        with ocp.Checkpointer(_Handler()) as reader:
            args = _Items(**{item: ocp.args.StandardRestore(stored)})
            targets |= reader.restore(path, args=args)[item]
    return {n: _leaves.place(targets[n], leaf, n in weak) for n, leaf in like.items()}


def _same(path: epath.Path, what: str, saved: dict[str, Any], here: dict[str, Any]) -> None:
    """Raise a ValueError that lists by name where two dicts differ."""
    differ = [
        f"{name} is {saved.get(name, 'absent')} there and {here.get(name, 'absent')} here"
        for name in dict.fromkeys([*here, *saved])
        if saved.get(name) != here.get(name)
    ]
    if differ:
        more = f"; and {len(differ) - 5} more" if len(differ) > 5 else ""
        raise ValueError(
            f"{path} was saved with another {what}: {'; '.join(differ[:5])}{more}. Go on with what "
            f"it was saved with, use another directory, or delete {path.parent} to start anew."
        )
