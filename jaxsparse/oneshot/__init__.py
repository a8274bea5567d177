"""One-shot pruning."""

from jaxsparse.oneshot._blockify import blockify
from jaxsparse.oneshot._prune import prune

__all__ = ["blockify", "prune"]
