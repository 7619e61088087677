"""Probes: they record and change nothing."""
