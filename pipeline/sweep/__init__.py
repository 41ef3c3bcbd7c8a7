"""Searching the settings of training with Ray Tune: many runs of `pipeline.train`, compared by metrics that do not
move."""
