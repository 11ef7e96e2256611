"""workers: whether one takes no new job.

Revision: 0013_worker_drain, after 0012_merges
"""

import sqlalchemy as sa
from alembic import op

revision = "0013_worker_drain"
down_revision = "0012_merges"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("workers", schema=None) as batch_op:
        batch_op.add_column(
            sa.Column("draining", sa.Boolean(), nullable=False, server_default=sa.false())
        )
    with op.batch_alter_table("workers", schema=None) as batch_op:
        batch_op.alter_column("draining", existing_type=sa.Boolean(), server_default=None)


def downgrade() -> None:
    with op.batch_alter_table("workers", schema=None) as batch_op:
        batch_op.drop_column("draining")
