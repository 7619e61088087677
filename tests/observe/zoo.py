"""Every animal by name: small models and loops in which nothing is wrong."""

from zoo_entry import Entry
from zoo_loops import LOOPS
from zoo_models import MODELS
from zoo_sequences import SEQUENCES

ZOO: dict[str, Entry] = {entry.name: entry for entry in (*SEQUENCES, *MODELS, *LOOPS)}
