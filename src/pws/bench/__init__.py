"""`pws bench`: a grid of settings trained side by side, and what a model costs with its norms, without them and with pws."""
