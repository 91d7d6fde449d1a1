"""What `anima-fast bench` and `benchmarks/` measure: the problems, the peers, and how."""
