"""The platform as plain Python: no module of this package imports Ray."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("llm-engine")
except PackageNotFoundError:  # run from a bare checkout, as Ray's working_dir gives one
    __version__ = "0.0.0"
