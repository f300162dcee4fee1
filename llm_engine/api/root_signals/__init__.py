"""The Root Signals dialect: the registry of aliases and external models, for `root-signals`."""

import orjson
from fastapi import APIRouter

from llm_engine.errors import APIError
from llm_engine.services import Services


def render_error(error: APIError) -> bytes:
    return orjson.dumps({"detail": error.message})


def build_router(services: Services) -> APIRouter:
    return APIRouter()
