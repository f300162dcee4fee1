"""The platform on Ray Serve. `app` is the table of contents."""
