"""Georeferencing: GPS tracks, robust similarity fits and georeferences of maps."""
