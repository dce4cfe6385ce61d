"""transformers' own model, one decoder layer of it in memory at a time."""
