"""merges: adapters and their bases as one set of weights.

Revision: 0012_merges, after 0011_job_logs
"""

import sqlalchemy as sa
from alembic import op

revision = "0012_merges"
down_revision = "0011_job_logs"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "merges",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("project_id", sa.String(), nullable=False),
        sa.Column("model", sa.String(), nullable=False),
        sa.Column("status", sa.String(), nullable=False),
        sa.Column("claimed_until", sa.Double(), nullable=True),
        sa.Column("file_id", sa.String(), nullable=True),
        sa.Column("error", sa.String(), nullable=True),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(
            ["project_id"], ["projects.id"], name="fk_merges_project_id_projects"
        ),
        sa.ForeignKeyConstraint(["model"], ["adapters.name"], name="fk_merges_model_adapters"),
        sa.PrimaryKeyConstraint("id", name="pk_merges"),
    )
    op.create_index("ix_merges_model", "merges", ["project_id", "model"])
    op.create_index("ix_merges_created_at", "merges", ["created_at"])


def downgrade() -> None:
    op.drop_table("merges")
