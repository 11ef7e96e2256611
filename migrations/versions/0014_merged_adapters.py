"""adapters: whether one is answered by a merged copy of its base.

Revision: 0014_merged_adapters, after 0013_worker_drain
"""

import sqlalchemy as sa
from alembic import op

revision = "0014_merged_adapters"
down_revision = "0013_worker_drain"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("adapters", schema=None) as batch_op:
        batch_op.add_column(
            sa.Column("merged", sa.Boolean(), nullable=False, server_default=sa.false())
        )
    with op.batch_alter_table("adapters", schema=None) as batch_op:
        batch_op.alter_column("merged", existing_type=sa.Boolean(), server_default=None)


def downgrade() -> None:
    with op.batch_alter_table("adapters", schema=None) as batch_op:
        batch_op.drop_column("merged")
