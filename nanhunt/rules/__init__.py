"""One rule a file, ``nhNNN_name.py``, found by its name; each judges records and knows no torch."""
