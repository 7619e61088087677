"""Somebody's script, run unmodified under the sentinel or the exact tracer."""
