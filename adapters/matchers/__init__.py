"""Matchers: SIFT, MASt3R and the keypoint tables of dense matchers."""
