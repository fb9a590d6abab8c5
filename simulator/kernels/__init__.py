"""Compiled loops behind four doors that take and give arrays: no policies or traces in here.

``span_mass`` and ``strongest_keys`` of ``spans``, ``window_importance`` of ``windows`` and ``Redundancy`` of
``duplicates``. Addresses, the sizes of tiles and the memory that loops work in stay inside.
"""
