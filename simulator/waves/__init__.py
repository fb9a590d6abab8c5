"""Demand profiles that ship with the package, one JSON file per model."""
