"""Detection and instance segmentation: data, networks, training and evaluation beside the classifier's."""
