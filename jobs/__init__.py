"""The commands: each parses its arguments, configures logging and calls one function of `pipeline`."""
