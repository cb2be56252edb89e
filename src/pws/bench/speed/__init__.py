"""`pws bench speed`: what each method costs, beside the same network without normalization."""
