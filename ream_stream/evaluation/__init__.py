"""Judge a checkpoint: is it whole, does it load, how good is it, which method is best."""
