"""Synthetic town: a rendered flight with exact ground truth, and a matcher that uses it."""
