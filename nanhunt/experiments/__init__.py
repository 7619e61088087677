"""Replays with exactly one thing changed, and what follows from them."""
