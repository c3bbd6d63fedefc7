"""The parts of `tools/bench_mast3r.py`."""
