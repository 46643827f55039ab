"""The parts of tools/bench.py, a file each: what is measured, its settings, and its floors."""
