"""Every method on the same holes: measured in parts on Ray, put together into one table, shown on one page."""
