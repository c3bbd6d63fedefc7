"""Calibrations of cameras from files."""
