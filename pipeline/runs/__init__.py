"""What every job has: a command line, Ray, settings that stay, a line on how far it is."""
