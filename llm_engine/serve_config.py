"""A configuration as a Ray Serve config file: what `serve deploy` puts on a cluster.

Pure: plain data in, plain data out. API keys never go in; the nodes have them in their environment.
"""

from typing import Any

from llm_engine.config import ENV_KEYS, ENV_SECRET, ENV_STORAGE, ENV_STORE, Settings

#: deployments.app.APP_NAME; a test compares the two.
APPLICATION = "llm-engine"
HEADER = f"""\
# llm-engine on a Ray cluster: serve deploy FILE   (RAY_DASHBOARD_ADDRESS names the cluster)
# API keys are not in here: give them to every node as {ENV_KEYS}=key1,key2, in the
# environment of `ray start`. So are {ENV_STORE} (PostgreSQL: one store for all nodes),
# {ENV_STORAGE} (S3, or a folder that all nodes share) and {ENV_SECRET}
# (encrypts the keys of external models), where the configuration does not name them.
# To add or change a model, edit user_config.endpoints and deploy again: nothing else restarts.
"""


def serve_config(settings: Settings) -> dict[str, Any]:
    gateway = settings.gateway
    told = gateway.model_dump(mode="json", exclude_defaults=True, exclude={"api_keys"})
    store = settings.store.model_dump(
        mode="json", exclude_defaults=True, exclude={"secret_key", "url"}
    )
    url = settings.store.url
    if url is not None and not has_password(url):
        store["url"] = url
    kept = {
        name: getattr(settings, name).model_dump(mode="json", exclude_defaults=True)
        for name in ("storage", "files", "batches", "fine_tunes", "responses")
    }
    if "state_dir" in settings.cluster.model_fields_set:  # where all would seem lost else
        if url is None:
            store["url"] = settings.store_url
        kept["storage"].setdefault("url", settings.storage_url)
    args = {"gateway": told, "store": store, **kept}
    endpoints = [each.model_dump(mode="json", exclude_defaults=True) for each in settings.endpoints]
    return {
        "proxy_location": "EveryNode",
        "http_options": {
            # An address of this machine means nothing on the other nodes.
            "host": gateway.host if gateway.is_loopback else "0.0.0.0",
            "port": gateway.port,
        },
        "logging_config": {"enable_access_log": False},
        "applications": [
            {
                "name": APPLICATION,
                "route_prefix": "/",
                "import_path": "deployments.app:build",
                # Never empty: `build` would then look for a configuration file on the node.
                "args": {k: v for k, v in args.items() if v or k == "gateway"},
                "deployments": [{"name": "Controller", "user_config": {"endpoints": endpoints}}],
            }
        ],
    }


def has_password(url: str) -> bool:
    """Rather once too often: a password may hold any character, or stand behind the path."""
    return not url.startswith("sqlite") and ("@" in url or "password=" in url)
