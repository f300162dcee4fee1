"""The platform on Ray Jobs: one `python -m jobs.<kind>` a kind of job."""
