"""One-shot pruning."""

from jaxsparse.oneshot._prune import prune

__all__ = ["prune"]
