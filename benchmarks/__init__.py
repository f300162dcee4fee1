"""Side-by-side measurements, one command each: see serving.py."""
