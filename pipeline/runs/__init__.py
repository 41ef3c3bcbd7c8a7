"""What every job does alike: one at a time in a folder, the same settings or none, how far it is."""
