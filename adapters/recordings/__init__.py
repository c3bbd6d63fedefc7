"""Recordings of what runs receive, and runs that repeat them."""
