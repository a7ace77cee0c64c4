"""What `cupaged bench` measures and how; the command line itself is cli/bench.py."""
