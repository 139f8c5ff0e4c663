"""The causal flow of one prompt: found by one gradient, decided by real removals."""
