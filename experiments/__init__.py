"""Runs that back a claim, one file each, on a small harness; they work from a checkout."""
