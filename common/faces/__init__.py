"""From an official data set layout on disk to augmented batches of aligned faces."""
