"""The calibrations of cameras."""
