"""Matching: scene graph, place recognition, verified pairs and keypoint tables."""
