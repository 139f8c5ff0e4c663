"""Every feature described: statistics, examples and labels of all latents of a run."""
