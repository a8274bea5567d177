"""Sparse training: `sparsify` and the algorithms that move its masks."""

from jaxsparse.training._blast import blast
from jaxsparse.training._block_gradual import block_gradual
from jaxsparse.training._block_rigl import block_rigl
from jaxsparse.training._block_set import block_set
from jaxsparse.training._block_static import block_static
from jaxsparse.training._compact import compact
from jaxsparse.training._fixed import fixed
from jaxsparse.training._gradual import gradual
from jaxsparse.training._probes import candidate_probe, exact_probe, sketch_probe
from jaxsparse.training._rigl import rigl
from jaxsparse.training._set import set_
from jaxsparse.training._sparsify import SparseState, check, masks, sparsify
from jaxsparse.training._sr_ste import sr_ste
from jaxsparse.training._srigl import srigl
from jaxsparse.training._static import static
from jaxsparse.training._ste import ste, straight_through
from jaxsparse.training._stored import add_probes
from jaxsparse.training._updater import MaskUpdater

__all__ = [
    "MaskUpdater",
    "SparseState",
    "add_probes",
    "blast",
    "block_gradual",
    "block_rigl",
    "block_set",
    "block_static",
    "candidate_probe",
    "check",
    "compact",
    "exact_probe",
    "fixed",
    "gradual",
    "masks",
    "rigl",
    "set_",
    "sketch_probe",
    "sparsify",
    "sr_ste",
    "srigl",
    "static",
    "ste",
    "straight_through",
]
