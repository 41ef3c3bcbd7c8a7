"""Batch inpainting: a collection of images and their holes in, filled images and a ledger out, on Ray."""
