"""Training with differential privacy, by Opacus."""
