"""One picture at a time over HTTP: the page of `tmad web`."""
