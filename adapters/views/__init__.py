"""Views: a run shown in the terminal and in Rerun."""
