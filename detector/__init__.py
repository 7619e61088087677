"""V3: a dual-stream (electrodes and their pairings) EEG seizure detector, and its trainer.

The detector is the first user of ``nanhunt``: its presets ``incident`` and ``small-incident`` fail the way the original
system failed, its presets ``v3`` and ``small`` do not.
"""
