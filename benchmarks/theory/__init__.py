"""What the theory says, beside what networks do."""
