"""adapters' names are longer than endpoints', and a batch may be for one"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("batches") as batches:
        batches.alter_column(
            "model", existing_type=sa.String(length=200), type_=sa.String(length=440)
        )
