"""Inputs whose truth is known, and how far a map is from it; `trust_bench.py` is the tool."""
