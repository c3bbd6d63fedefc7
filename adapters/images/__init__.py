"""Encoded images and their EXIF blocks."""
