"""Models of others, converted."""
