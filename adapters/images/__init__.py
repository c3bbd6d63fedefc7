"""Encoded images, their EXIF blocks, and the keypoints that dense matchers begin with."""
