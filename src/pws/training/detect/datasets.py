def load_detection_splits(config, seed):
    raise NotImplementedError
