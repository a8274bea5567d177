"""Readable reference models, one file each; they run from a checkout and are not in the wheel."""
