"""The wiring: read this file first.

    client ──▶ Ingress ──private HTTP──▶ the engine of an EngineReplica
     │            ▲ who serves what           │ load, health
     │            └──────── ModelRouter ◀─────┘
     │                          ▲ state of each endpoint, keys, registered models
     ├──▶ Store (SQL) ──▶ Controller ── one application per endpoint ──▶ Ray Serve
     │         └────────▶ JobKeeper ─── one job per batch, fine-tune ──▶ Ray Jobs
     └──▶ Storage (files) ◀── the jobs, which ask the gateway like any client

`build` makes the gateway application: `serve run deployments.app:build config=llm-engine.yaml`,
the import path of serve.yaml, and what `llm-engine up` runs. The engines' applications are made by
the Controller, so that a gateway can be redeployed while they serve on.
"""

import os
from typing import Any

from ray import serve

from deployments.controller import Controller
from deployments.ingress import Ingress
from deployments.keeper import JobKeeper
from deployments.router import ModelRouter
from llm_engine import config
from llm_engine.config import ENV_CONFIG, Settings
from llm_engine.errors import ConfigError

APP_NAME = "llm-engine"


def build(args: dict[str, Any]) -> serve.Application:
    """The gateway, from `config` (a path), or from the sections of a configuration themselves."""
    settings = settings_from(args)
    settings.check_exposure()
    gateway = settings.gateway
    router = ModelRouter.bind()
    shared = settings.model_copy(update={"endpoints": ()})
    controller = Controller.options(user_config=endpoints_config(settings)).bind(shared, router)
    keeper = JobKeeper.bind(shared)
    return Ingress.options(
        ray_actor_options={"num_cpus": gateway.num_cpus},
        # Room to spare: the gateway itself says no first, in OpenAI's words.
        max_ongoing_requests=2 * gateway.max_in_flight,
        graceful_shutdown_timeout_s=gateway.drain_timeout_s,
        max_surge_percent=100,  # a new ingress takes over before the old one goes
        autoscaling_config={
            "min_replicas": gateway.min_replicas,
            "max_replicas": gateway.max_replicas,
            "target_ongoing_requests": gateway.target_in_flight,
        },
    ).bind(shared, router, controller, keeper)


def settings_from(args: dict[str, Any]) -> Settings:
    args = dict(args)
    path = args.pop("config", None) or (None if args else os.environ.get(ENV_CONFIG))
    if path is not None:
        if args:
            raise ConfigError(f"next to `config` there can be no {', '.join(map(repr, args))}")
        return config.load(path)
    return config.parse(args, dict(os.environ))


def endpoints_config(settings: Settings) -> dict[str, Any]:
    """The Controller's user_config: Serve hands it to the running Controller when it changes."""
    return {"endpoints": [each.model_dump(mode="json") for each in settings.endpoints]}
