"""What a batch is made of: its input checked, its rows run, its results put together."""
