"""Saved steps: the file format, the sentinel that writes it, and running a step again."""
