"""Deploys the gateway on a running local Ray and exits: the part of `llm-engine up` that needs Ray.

A process of its own, since Ray in a process takes over its signals. Settings come as one line of
JSON on stdin, the Ray address is the only argument.
"""

import json
import os
import sys

import ray
from ray import serve

from deployments.app import APP_NAME, build
from llm_engine import config


def main() -> None:
    settings = config.parse(json.loads(sys.stdin.readline()), dict(os.environ))
    ray.init(sys.argv[1], log_to_driver=False, logging_level="ERROR")
    gateway = settings.gateway
    serve.start(
        proxy_location="HeadOnly", http_options={"host": gateway.host, "port": gateway.port}
    )
    serve.run(
        build(config.dump(settings, reveal=True)),
        name=APP_NAME,
        route_prefix="/",
        logging_config={"enable_access_log": False},
    )


if __name__ == "__main__":
    main()
