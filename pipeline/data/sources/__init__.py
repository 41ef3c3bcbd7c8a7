"""Where photographs come from: trees, tar shards, Parquet tables and lists, all behind `base.Source`."""
