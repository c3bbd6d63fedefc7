"""Work of a run on other machines, by a Ray cluster."""
