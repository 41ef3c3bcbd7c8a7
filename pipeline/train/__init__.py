"""Training: what a worker sees (`context`), what it does (`loop`), how the workers are started (`launch`)."""
