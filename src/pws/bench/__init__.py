"""Measurements of pws against other methods and of its theory against training."""
