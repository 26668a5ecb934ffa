"""Speed and memory of the operations against other ways to compute them; correctness is checked before any timing."""
