"""One picture at a time for people and programs: the page of `tmad web`, the service of `tmad serve`."""
