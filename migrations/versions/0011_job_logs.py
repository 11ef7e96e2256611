"""job_log_parts: what the trainers of a job wrote, kept with the job.

Revision: 0011_job_logs, after 0010_page_indexes
"""

import sqlalchemy as sa
from alembic import op

revision = "0011_job_logs"
down_revision = "0010_page_indexes"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "job_log_parts",
        sa.Column("job_id", sa.String(), nullable=False),
        sa.Column("start", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("n_bytes", sa.Integer(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("text", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_job_log_parts_job_id_jobs"),
        sa.PrimaryKeyConstraint("job_id", "start", name="pk_job_log_parts"),
    )


def downgrade() -> None:
    op.drop_table("job_log_parts")
