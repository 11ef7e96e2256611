"""events and metrics: what a job's page asks for is found without reading every step.

Revision: 0010_page_indexes, after 0009_sweeps_stored
"""

import sqlalchemy as sa
from alembic import op

revision = "0010_page_indexes"
down_revision = "0009_sweeps_stored"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index("ix_events_messages", "events", ["job_id", "type", "sequence"])
    with op.batch_alter_table("metrics", schema=None) as batch_op:
        batch_op.add_column(
            sa.Column("is_judged", sa.Boolean(), nullable=False, server_default=sa.false())
        )
    op.execute("UPDATE metrics SET is_judged = (\"values\" ->> 'full_valid_loss' IS NOT NULL)")
    with op.batch_alter_table("metrics", schema=None) as batch_op:
        batch_op.alter_column("is_judged", existing_type=sa.Boolean(), server_default=None)
    op.create_index("ix_metrics_judged", "metrics", ["job_id", "is_judged", "step"])


def downgrade() -> None:
    op.drop_index("ix_metrics_judged", "metrics")
    with op.batch_alter_table("metrics", schema=None) as batch_op:
        batch_op.drop_column("is_judged")
    op.drop_index("ix_events_messages", "events")
