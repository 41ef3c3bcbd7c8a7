"""Pages for readers: one HTML file each, from the templates beside this file."""
