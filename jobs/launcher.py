"""Starts, watches and stops the Ray jobs of records: one process a record, under the record's name.

The one file that speaks to Ray Jobs. All methods block.
"""

import json
import shlex
import sys
from dataclasses import dataclass
from typing import Any

from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from jobs.settings import ENV_JOB
from llm_engine.config import Settings, dump
from llm_engine.errors import LLMEngineError
from llm_engine.serve_config import has_password

_LIVE = (JobStatus.PENDING, JobStatus.RUNNING)


class LaunchError(LLMEngineError):
    """Ray's job API does not do what it is asked; the text says why."""


@dataclass(frozen=True, slots=True)
class Job:
    id: str
    live: bool
    running: bool  # its process has been started
    message: str  # how Ray says it is, or how it ended


class Launcher:
    def __init__(self, address: str, settings: Settings) -> None:
        """`address`: of Ray's GCS, host:port."""
        self._address = address
        self._settings = job_settings(settings)
        self._client: JobSubmissionClient | None = None

    def start(
        self,
        module: str,
        record: str,
        job: str,
        gateways: list[str],
        metadata: dict[str, str],
        *,
        num_cpus: float,
        num_gpus: float = 0,
    ) -> None:
        """Run `python -m MODULE RECORD` as the job named `job`. Raises LaunchError."""
        environment = {
            ENV_JOB: json.dumps({"settings": self._settings, "gateways": gateways}),
            "PYTHONUNBUFFERED": "1",  # its progress shows in the dashboard as it is made
        }
        self._call(
            "submit_job",
            entrypoint=f"exec {shlex.quote(sys.executable)} -m {module} {record}",
            submission_id=job,
            entrypoint_num_cpus=num_cpus,
            entrypoint_num_gpus=num_gpus or None,
            runtime_env={"env_vars": environment},
            metadata=metadata,
        )

    def find(self, job: str) -> Job | None:
        """None where Ray knows nothing of it. Raises LaunchError."""
        try:
            details = self._call("get_job_info", job)
        except LaunchError as error:
            if "does not exist" in str(error):
                return None
            raise
        running = details.status is JobStatus.RUNNING
        return Job(job, details.status in _LIVE, running, _first_line(details.message))

    def stop(self, job: str) -> None:
        """Ends its process; does not wait for it."""
        self._call("stop_job", job)

    def _call(self, method: str, *args: Any, **options: Any) -> Any:
        try:
            if self._client is None:
                self._client = JobSubmissionClient(self._address)
            return getattr(self._client, method)(*args, **options)
        except (RuntimeError, ValueError, AuthenticationError) as error:
            raise LaunchError(_first_line(str(error))) from error
        except OSError as error:  # all that `requests` raises, and a refused connection
            self._client = None  # the head may come back under another address
            raise LaunchError(f"Ray's job API does not answer: {type(error).__name__}") from error


def job_settings(settings: Settings) -> dict[str, Any]:
    """What a job is told: without secrets, for Ray shows a job's environment to operators.

    Those it finds in its node's own environment.
    """
    told = dump(settings)
    told["gateway"].pop("api_keys")
    told["store"].pop("secret_key")
    if settings.store.url is not None and has_password(settings.store.url):
        told["store"].pop("url")
    return told | {"endpoints": []}


def _first_line(text: str | None) -> str:
    """Of what may be a traceback."""
    lines = [line.strip() for line in (text or "").splitlines() if line.strip()]
    return lines[0][:500] if lines else ""
