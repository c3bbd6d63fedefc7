"""Exports: copies of one of a run's latest maps in the formats of other tools."""
