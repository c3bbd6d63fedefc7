"""Output: run folder, journal, snapshots, trajectories and figures of a run on disk."""
