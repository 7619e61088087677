"""Reproducible failures: one per file, broken and fixed, with the findings that replaying it must yield."""
