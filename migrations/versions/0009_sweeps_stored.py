"""Sweeps of jobs; chat completions that are kept.

Revision: 0009_sweeps_stored, after 0008_batches_webhooks
"""

import sqlalchemy as sa
from alembic import op

revision = "0009_sweeps_stored"
down_revision = "0008_batches_webhooks"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "stored_completions",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("project_id", sa.String(), nullable=False),
        sa.Column("model", sa.String(), nullable=False),
        sa.Column("request", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("completion", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("request_metadata", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(
            ["project_id"], ["projects.id"], name=op.f("fk_stored_completions_project_id_projects")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_stored_completions")),
    )
    with op.batch_alter_table("stored_completions", schema=None) as batch_op:
        batch_op.create_index(
            batch_op.f("ix_stored_completions_created_at"), ["created_at"], unique=False
        )
        batch_op.create_index(
            "ix_stored_completions_list", ["project_id", "created_at", "id"], unique=False
        )

    op.create_table(
        "sweeps",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("project_id", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=True),
        sa.Column("job", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("grid", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(
            ["project_id"], ["projects.id"], name=op.f("fk_sweeps_project_id_projects")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_sweeps")),
    )
    with op.batch_alter_table("sweeps", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_sweeps_created_at"), ["created_at"], unique=False)
        batch_op.create_index("ix_sweeps_list", ["project_id", "created_at", "id"], unique=False)

    op.create_table(
        "sweep_jobs",
        sa.Column("sweep_id", sa.String(), nullable=False),
        sa.Column("position", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("job_id", sa.String(), nullable=False),
        sa.Column("point", sa.JSON(none_as_null=True), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_sweep_jobs_job_id_jobs")),
        sa.ForeignKeyConstraint(
            ["sweep_id"], ["sweeps.id"], name=op.f("fk_sweep_jobs_sweep_id_sweeps")
        ),
        sa.PrimaryKeyConstraint("sweep_id", "position", name=op.f("pk_sweep_jobs")),
    )
    with op.batch_alter_table("sweep_jobs", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_sweep_jobs_job_id"), ["job_id"], unique=False)


def downgrade() -> None:
    with op.batch_alter_table("sweep_jobs", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_sweep_jobs_job_id"))

    op.drop_table("sweep_jobs")
    with op.batch_alter_table("sweeps", schema=None) as batch_op:
        batch_op.drop_index("ix_sweeps_list")
        batch_op.drop_index(batch_op.f("ix_sweeps_created_at"))

    op.drop_table("sweeps")
    with op.batch_alter_table("stored_completions", schema=None) as batch_op:
        batch_op.drop_index("ix_stored_completions_list")
        batch_op.drop_index(batch_op.f("ix_stored_completions_created_at"))

    op.drop_table("stored_completions")
