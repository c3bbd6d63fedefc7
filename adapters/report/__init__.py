"""The report of a run: one page that says how good its map is, and where it is not."""
