"""Which registered version has the alias, and by which rule."""
