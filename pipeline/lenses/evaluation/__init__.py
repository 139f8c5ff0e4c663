"""Measuring dictionaries: which ones, on which rows, how well they reconstruct, and what the model
loses by them."""
