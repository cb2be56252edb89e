"""What the layers of a network do in one forward and backward pass, recorded while it runs."""
