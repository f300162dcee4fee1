"""responses, conversations, streams and stored chats"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = depends_on = None

_TIME = sa.Float(53).with_variant(sa.DOUBLE_PRECISION(), "postgresql")
_SERIAL = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "chats",
        sa.Column("id", sa.String(length=80), nullable=False),
        sa.Column("owner", sa.String(length=100), nullable=False),
        sa.Column("model", sa.String(length=440), nullable=False),
        sa.Column("created_at", _TIME, nullable=False),
        sa.Column("expires_at", _TIME, nullable=False),
        sa.Column("metadata", sa.JSON(), nullable=False),
        sa.Column("request", sa.JSON(), nullable=False),
        sa.Column("answer", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_chats"),
    )
    op.create_index("ix_chats_expires_at", "chats", ["expires_at"])
    op.create_index("ix_chats_owner_created_at_id", "chats", ["owner", "created_at", "id"])
    op.create_table(
        "conversation_items",
        sa.Column("serial", _SERIAL, autoincrement=True, nullable=False),
        sa.Column("conversation", sa.String(length=40), nullable=False),
        sa.Column("item", sa.String(length=80), nullable=False),
        sa.Column("data", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("serial", name="pk_conversation_items"),
        sa.UniqueConstraint("conversation", "item", name="uq_conversation_items_conversation_item"),
        sqlite_autoincrement=True,
    )
    op.create_index(
        "ix_conversation_items_conversation_serial",
        "conversation_items",
        ["conversation", "serial"],
    )
    op.create_table(
        "conversations",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("owner", sa.String(length=100), nullable=False),
        sa.Column("created_at", _TIME, nullable=False),
        sa.Column("metadata", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_conversations"),
    )
    op.create_index("ix_conversations_owner", "conversations", ["owner"])
    op.create_table(
        "feed",
        sa.Column("serial", _SERIAL, autoincrement=True, nullable=False),
        sa.Column("owner", sa.String(length=100), nullable=False),
        sa.Column("stream", sa.String(length=40), nullable=True),
        sa.Column("response", sa.String(length=40), nullable=False),
        sa.PrimaryKeyConstraint("serial", name="pk_feed"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_feed_owner_stream_serial", "feed", ["owner", "stream", "serial"])
    op.create_index("ix_feed_response", "feed", ["response"])
    op.create_table(
        "response_events",
        sa.Column("response", sa.String(length=40), nullable=False),
        sa.Column("first", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("last", sa.Integer(), nullable=False),
        sa.Column("events", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("response", "first", name="pk_response_events"),
    )
    op.create_table(
        "responses",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("owner", sa.String(length=100), nullable=False),
        sa.Column("dialect", sa.String(length=20), nullable=False),
        sa.Column("model", sa.String(length=440), nullable=False),
        sa.Column("state", sa.String(length=20), nullable=False),
        sa.Column("created_at", _TIME, nullable=False),
        sa.Column("ended_at", _TIME, nullable=True),
        sa.Column("expires_at", _TIME, nullable=False),
        sa.Column("background", sa.Boolean(), nullable=False),
        sa.Column("streamed", sa.Boolean(), nullable=False),
        sa.Column("request", sa.JSON(), nullable=False),
        sa.Column("input", sa.JSON(), nullable=False),
        sa.Column("output", sa.JSON(), nullable=False),
        sa.Column("previous", sa.String(length=40), nullable=True),
        sa.Column("conversation", sa.String(length=40), nullable=True),
        sa.Column("context_until", sa.BigInteger(), nullable=True),
        sa.Column("stream", sa.String(length=40), nullable=True),
        sa.Column("custom_id", sa.String(length=512), nullable=True),
        sa.Column("error", sa.JSON(), nullable=True),
        sa.Column("incomplete", sa.String(length=40), nullable=True),
        sa.Column("usage", sa.JSON(), nullable=True),
        sa.Column("sees_all", sa.Boolean(), nullable=False),
        sa.Column("worker", sa.String(length=80), nullable=True),
        sa.Column("lease_until", _TIME, nullable=False),
        sa.Column("starts", sa.Integer(), nullable=False),
        sa.Column("cancel_asked", sa.Boolean(), nullable=False),
        sa.Column("told", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_responses"),
    )
    op.create_index("ix_responses_expires_at", "responses", ["expires_at"])
    op.create_index("ix_responses_owner_id", "responses", ["owner", "id"])
    op.create_index("ix_responses_owner_state", "responses", ["owner", "state"])
    op.create_index("ix_responses_state_id", "responses", ["state", "id"])
    op.create_index("ix_responses_stream_id", "responses", ["stream", "id"])
    op.create_index("ix_responses_stream_state", "responses", ["stream", "state"])
    op.create_index("ix_responses_worker_state", "responses", ["worker", "state"])
    op.create_table(
        "streams",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("owner", sa.String(length=100), nullable=False),
        sa.Column("name", sa.String(length=200), nullable=False),
        sa.Column("window", sa.String(length=10), nullable=False),
        sa.Column("state", sa.String(length=20), nullable=False),
        sa.Column("created_at", _TIME, nullable=False),
        sa.Column("updated_at", _TIME, nullable=False),
        sa.Column("cancelled_at", _TIME, nullable=True),
        sa.Column("archived_at", _TIME, nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_streams"),
    )
    op.create_index("ix_streams_owner", "streams", ["owner"])
