"""What the model is run on: text, tokens, and where they come from."""
