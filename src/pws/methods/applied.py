def apply_method(*a, **k):
    raise NotImplementedError
