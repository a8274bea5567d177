"""Sparse training: `sparsify` and the algorithms that move its masks."""

from jaxsparse.training._blast import blast
from jaxsparse.training._block_gradual import block_gradual
from jaxsparse.training._block_rigl import block_rigl
from jaxsparse.training._block_set import block_set
from jaxsparse.training._block_static import block_static
from jaxsparse.training._cast import cast
from jaxsparse.training._compact import compact
from jaxsparse.training._dense_when import dense_when
from jaxsparse.training._fixed import fixed
from jaxsparse.training._flip_meter import choose_decay, flip_meter
from jaxsparse.training._frozen_adam import frozen_adam
from jaxsparse.training._gradual import gradual
from jaxsparse.training._group_envelope import group_envelope, group_envelope_prox
from jaxsparse.training._mask_decay import mask_decay
from jaxsparse.training._masked_adam import masked_adam
from jaxsparse.training._mvue import mvue
from jaxsparse.training._nm_matmul import nm_matmul
from jaxsparse.training._probes import candidate_probe, exact_probe, sketch_probe
from jaxsparse.training._rigl import rigl
from jaxsparse.training._s_ste import nm_soft_threshold, s_ste
from jaxsparse.training._set import set_
from jaxsparse.training._slorb import slorb, slorb_init
from jaxsparse.training._sparsify import SparseState, check, masks, sparsify
from jaxsparse.training._sr_ste import sr_ste
from jaxsparse.training._srigl import srigl
from jaxsparse.training._static import static
from jaxsparse.training._ste import ste, straight_through
from jaxsparse.training._stored import add_probes
from jaxsparse.training._tile_masks import TileLogits, tile_logits, tile_mask
from jaxsparse.training._updater import MaskUpdater

__all__ = [
    "MaskUpdater",
    "SparseState",
    "TileLogits",
    "add_probes",
    "blast",
    "block_gradual",
    "block_rigl",
    "block_set",
    "block_static",
    "candidate_probe",
    "cast",
    "check",
    "choose_decay",
    "compact",
    "dense_when",
    "exact_probe",
    "fixed",
    "flip_meter",
    "frozen_adam",
    "gradual",
    "group_envelope",
    "group_envelope_prox",
    "mask_decay",
    "masked_adam",
    "masks",
    "mvue",
    "nm_matmul",
    "nm_soft_threshold",
    "rigl",
    "s_ste",
    "set_",
    "sketch_probe",
    "slorb",
    "slorb_init",
    "sparsify",
    "sr_ste",
    "srigl",
    "static",
    "ste",
    "straight_through",
    "tile_logits",
    "tile_mask",
]
