"""Windows of keyframes: which are solved, and how results are merged."""
