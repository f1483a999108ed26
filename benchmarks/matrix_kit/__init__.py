"""The parts of `conversion_matrix.py`: cells, latencies and the page."""
