"""Compiled loops behind five doors that take and give arrays: no policies or traces in here.

``span_mass`` and ``strongest_keys`` of ``spans``, ``window_importance`` of ``windows``, ``Redundancy`` of
``duplicates`` and ``Ledger`` of ``ledger``, which holds a layer's entries. Addresses, the sizes of tiles and
the memory that loops work in stay inside.
"""
