"""What machines need: the local stack as a module, everything else as files for the tools that read them."""
