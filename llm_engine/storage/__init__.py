"""Bytes: files and results, in a folder or in S3."""
