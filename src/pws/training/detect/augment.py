def augmentation(name, size):
    raise NotImplementedError
