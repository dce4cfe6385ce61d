"""The run: layer after layer, each of them committed alone."""
