"""One replica's model: an engine is a process of its own with an OpenAI server on a private port."""
