"""`pws bench convert`: conversion of real models that nobody here wrote."""
