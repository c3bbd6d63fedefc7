"""What a run leaves on disk: run folder, journal, snapshots, trajectories, figures."""
