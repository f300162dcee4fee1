"""One replica's model: an engine is a process with an OpenAI server on a private port."""
