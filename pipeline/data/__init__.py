"""Photographs to batches: listing, preparation by Ray Data, the prepared set's format, the training input."""
