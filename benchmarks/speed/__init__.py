"""What each method costs beside the same network without normalization."""
