"""Alembic's entry: runs the migrations on the connection that `Database.migrate` holds."""

from alembic import context

from llm_engine.store.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    render_as_batch=True,  # SQLite alters a table by copying it
    transactional_ddl=True,
)
with context.begin_transaction():
    context.run_migrations()
