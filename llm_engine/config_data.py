"""The part of the settings that is about what is kept: rows, bytes, files and batches."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator

MASK = "**********"
ENV_STORE = "LLM_ENGINE_STORE_URL"
ENV_SECRET = "LLM_ENGINE_SECRET_KEY"
ENV_STORAGE = "LLM_ENGINE_STORAGE_URL"


class Section(BaseModel):
    # PostgreSQL's JSON knows neither infinity nor NaN, and no setting means anything with them.
    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False
    )


class StoreSettings(Section):
    """The rows: keys, endpoints, registered models."""

    url: str | None = Field(
        None,
        description="sqlite:///FILE or postgresql://USER:PASSWORD@HOST/DATABASE; "
        f"{ENV_STORE} wins. Unset: SQLite in cluster.state_dir. A cluster of several nodes "
        "needs PostgreSQL.",
    )
    secret_key: SecretStr | None = Field(
        None,
        description=f"Encrypts the keys of external models; {ENV_SECRET} wins. Unset, and with "
        "SQLite: a file beside it.",
    )
    max_keys: int = Field(10_000, ge=1, description="Keys, at most: each gateway knows them all.")
    max_endpoints: int = Field(1_000, ge=1, description="Endpoints, at most.")
    max_models: int = Field(10_000, ge=1, description="Registered models, at most.")

    @field_validator("url")
    @classmethod
    def _unmasked(cls, url: str | None) -> str | None:
        if url is not None and (f":{MASK}@" in url or f"password={MASK}" in url):
            raise ValueError("a masked password is no password; put the real one")
        return url


class StorageSettings(Section):
    """The bytes: files, results."""

    url: str | None = Field(
        None,
        description="A folder, or s3://BUCKET/PREFIX; "
        f"{ENV_STORAGE} wins. Unset: `storage` in cluster.state_dir. A cluster of several nodes "
        "needs S3, or a folder that all of them share.",
    )
    s3_endpoint_url: str | None = Field(
        None, description="Of an S3-compatible server. Unset: AWS. Keys come as boto3 finds them."
    )
    s3_region: str | None = Field(None, description="Unset: as boto3 finds it.")
    s3_path_style: bool = Field(
        False, description="Bucket names in the path, as most servers but AWS want it."
    )
    s3_encryption: Literal["AES256", "aws:kms"] | None = Field(
        None, description="Server-side encryption that is asked for with each object."
    )
    s3_kms_key: str | None = Field(None, description="With aws:kms: the key's id.")
    direct_links: bool = Field(
        False,
        description="Download links lead to S3 itself (presigned), not through the gateway.",
    )
    cache_dir: Path | None = Field(
        None,
        description="Where a node keeps adapters for its engines. Unset: `cache` in "
        "cluster.state_dir.",
    )
    cache_bytes: int = Field(
        10 * 2**30, ge=1, description="Of adapters that a node keeps; the least used go. Bytes."
    )
    link_expires_s: int = Field(
        3600, ge=60, le=7 * 86400, description="How long a download link is good. Seconds."
    )


class FileSettings(Section):
    """Files that clients upload."""

    max_bytes: int = Field(512 * 2**20, ge=1, description="Of one file. Bytes.")
    max_upload_bytes: int = Field(8 * 2**30, ge=1, description="Of one that comes in parts. Bytes.")
    max_part_bytes: int = Field(64 * 2**20, ge=1, description="Of a part. Bytes.")
    max_parts: int = Field(10_000, ge=1, description="Of an upload.")
    upload_timeout_s: float = Field(
        3600, gt=0, description="How long an upload takes parts until it expires. Seconds."
    )
    max_files: int = Field(100_000, ge=1, description="Of one owner.")


class BatchSettings(Section):
    """Batches: many requests at once, run by a Ray job each."""

    max_rows: int = Field(50_000, ge=1, description="Requests in a batch.")
    max_file_bytes: int = Field(200 * 2**20, ge=1, description="Of an input file. Bytes.")
    max_inline_bytes: int = Field(
        64 * 2**20, ge=1, description="Of a request that brings its rows along. Bytes."
    )
    max_open: int = Field(1_000, ge=1, description="Of one owner that have not ended.")
    max_running: int = Field(
        4,
        ge=1,
        description="Jobs at a time; the others wait their turn. Beyond them, as many owners who "
        "have none get one each.",
    )
    max_concurrency: int = Field(
        256, ge=1, description="Requests of one batch that are under way at a time."
    )
    max_attempts: int = Field(
        5, ge=1, description="Tries of a request that the engine fails, before it is an error."
    )
    max_idle_starts: int = Field(
        5, ge=1, description="Jobs in a row that die before they finish a single request."
    )
    lease_s: float = Field(
        15, ge=2, description="A job that is silent for so long is taken for dead. Seconds."
    )
    num_cpus: float = Field(0.1, ge=0, description="Ray CPUs a job reserves.")
    data_paths: tuple[str, ...] = Field(
        (),
        description="Folders and s3:// prefixes that clients may name as a batch's input_data_path "
        "and output_data_path. A path that is relative lies in the storage.",
    )


class FineTuneSettings(Section):
    """Fine-tunes: each a Ray job that trains an adapter."""

    max_rows: int = Field(100_000, ge=1, description="Examples in a training file.")
    max_file_bytes: int = Field(512 * 2**20, ge=1, description="Of a training file. Bytes.")
    max_open: int = Field(20, ge=1, description="Of one owner that have not ended.")
    max_running: int = Field(1, ge=1, description="Jobs at a time; the others wait their turn.")
    max_idle_starts: int = Field(
        5, ge=1, description="Jobs in a row that die before they keep one more checkpoint."
    )
    lease_s: float = Field(
        15, ge=2, description="A job that is silent for so long is taken for dead. Seconds."
    )
    workers: int = Field(
        1, ge=1, description="Processes that train one model together (data parallel)."
    )
    num_cpus: float = Field(1, ge=0, description="Ray CPUs each of them reserves.")
    num_gpus: float = Field(0, ge=0, description="Ray GPUs each of them reserves; 0: CPUs train.")
    max_length: int = Field(
        2048,
        ge=8,
        description="Longer examples are cut, or the model's context if less. Tokens.",
    )
    checkpoint_every_s: float = Field(
        60, gt=0, description="What a crash costs at most. Seconds of training."
    )
    kept_checkpoints: int = Field(
        3, ge=1, description="Of the last epochs; each can be named as a model."
    )


class ResponseSettings(Section):
    """Responses, conversations, streams, and chats that are stored."""

    expires_s: float = Field(
        30 * 86400, gt=0, description="How long responses and stored chats are kept. Seconds."
    )
    max_open: int = Field(
        10_000, ge=1, description="Of one owner in the background that have not ended."
    )
    max_running: int = Field(
        64, ge=1, description="Of those in the background, at a time and gateway replica."
    )
    max_attempts: int = Field(
        3,
        ge=1,
        description="How often the gateway or the engine of one may be lost, before it has failed.",
    )
    lease_s: float = Field(
        10, ge=2, description="A gateway that is silent for so long is taken for dead. Seconds."
    )
    background_timeout_s: float = Field(
        86400,
        gt=0,
        description="How long one in the background waits for its model before it has failed. "
        "Seconds.",
    )
    max_chain: int = Field(
        1_000, ge=1, description="Responses that one goes on from, by previous_response_id."
    )
    max_events_bytes: int = Field(
        8 * 2**20, ge=2**16, description="Events that are kept of one response. Bytes."
    )
    max_conversation_items: int = Field(10_000, ge=1, description="Items in a conversation.")
    max_streams: int = Field(
        1_000, ge=1, description="Streams of one owner; archived ones do not count."
    )
    max_wait_s: float = Field(
        25,
        gt=0,
        description="Longest wait of sference's clients, for an answer or for events; they give up "
        "after 30 s. Seconds.",
    )
