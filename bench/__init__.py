"""Evidence: what the project claims, measured. Each module runs as `python -m bench.NAME`."""
