"""tenancy: limits of projects and keys, reservations, permissions, audit log, kept adapters.

Revision: 0007_tenancy, after 0006_workers_and_usage
"""

import sqlalchemy as sa
from alembic import op

revision = "0007_tenancy"
down_revision = "0006_workers_and_usage"
branch_labels = None
depends_on = None

_LIMITS = {
    "max_bytes": sa.BigInteger(),
    "max_waiting_jobs": sa.Integer(),
    "max_running_jobs": sa.Integer(),
    "tokens_per_day": sa.BigInteger(),
    "device_hours_per_month": sa.Double(),
}
_RATES = {"requests_per_minute": sa.Integer(), "tokens_per_minute": sa.Integer()}


def upgrade() -> None:
    op.create_table(
        "organizations",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_organizations")),
        sa.UniqueConstraint("name", name=op.f("uq_organizations_name")),
    )
    with op.batch_alter_table("organizations", schema=None) as batch_op:
        batch_op.create_index(
            batch_op.f("ix_organizations_created_at"), ["created_at"], unique=False
        )
    with op.batch_alter_table("projects", schema=None) as batch_op:
        batch_op.add_column(sa.Column("organization_id", sa.String(), nullable=True))
        batch_op.add_column(sa.Column("share", sa.Double(), nullable=False, server_default="1"))
        for name, kind in (_LIMITS | _RATES).items():
            batch_op.add_column(sa.Column(name, kind, nullable=True))
        batch_op.create_foreign_key(
            batch_op.f("fk_projects_organization_id_organizations"),
            "organizations",
            ["organization_id"],
            ["id"],
        )
    with op.batch_alter_table("api_keys", schema=None) as batch_op:
        for name, kind in _RATES.items():
            batch_op.add_column(sa.Column(name, kind, nullable=True))
    with op.batch_alter_table("jobs", schema=None) as batch_op:
        batch_op.add_column(
            sa.Column("reserved_tokens", sa.BigInteger(), nullable=False, server_default="0")
        )
        batch_op.add_column(
            sa.Column("reserved_device_seconds", sa.Double(), nullable=False, server_default="0")
        )
        batch_op.drop_index("ix_jobs_created_at")
        batch_op.create_index("ix_jobs_project", ["project_id", "status"], unique=False)
    with op.batch_alter_table("job_attempts", schema=None) as batch_op:
        batch_op.create_index("ix_job_attempts_ended_at", ["ended_at"], unique=False)
    with op.batch_alter_table("files", schema=None) as batch_op:
        batch_op.drop_index("ix_files_created_at")
        batch_op.create_index("ix_files_list", ["project_id", "created_at", "id"], unique=False)
    with op.batch_alter_table("adapters", schema=None) as batch_op:
        batch_op.add_column(sa.Column("archived_at", sa.Double(), nullable=True))
        batch_op.alter_column("job_id", existing_type=sa.String(), nullable=True)
        batch_op.drop_index("ix_adapters_created_at")
        batch_op.create_index(
            "ix_adapters_list", ["project_id", "created_at", "name"], unique=False
        )
    op.create_table(
        "checkpoint_permissions",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("model", sa.String(), nullable=False),
        sa.Column("owner_id", sa.String(), nullable=False),
        sa.Column("project_id", sa.String(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(
            ["owner_id"], ["projects.id"], name=op.f("fk_checkpoint_permissions_owner_id_projects")
        ),
        sa.ForeignKeyConstraint(
            ["project_id"],
            ["projects.id"],
            name=op.f("fk_checkpoint_permissions_project_id_projects"),
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_checkpoint_permissions")),
        sa.UniqueConstraint(
            "model", "project_id", name=op.f("uq_checkpoint_permissions_model_project_id")
        ),
    )
    with op.batch_alter_table("checkpoint_permissions", schema=None) as batch_op:
        batch_op.create_index(
            batch_op.f("ix_checkpoint_permissions_created_at"), ["created_at"], unique=False
        )
    op.create_table(
        "audit_logs",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("project_id", sa.String(), nullable=False),
        sa.Column("key_id", sa.String(), nullable=True),
        sa.Column("request_id", sa.String(), nullable=True),
        sa.Column("type", sa.String(), nullable=False),
        sa.Column("object_id", sa.String(), nullable=False),
        sa.Column("details", sa.JSON(), nullable=True),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(
            ["project_id"], ["projects.id"], name=op.f("fk_audit_logs_project_id_projects")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_audit_logs")),
    )
    with op.batch_alter_table("audit_logs", schema=None) as batch_op:
        batch_op.create_index(
            "ix_audit_logs_list", ["project_id", "created_at", "id"], unique=False
        )


def downgrade() -> None:
    op.drop_table("audit_logs")
    op.drop_table("checkpoint_permissions")
    # An adapter without a job came from outside; the tables before know none.
    op.execute("DELETE FROM adapters WHERE job_id IS NULL")
    with op.batch_alter_table("adapters", schema=None) as batch_op:
        batch_op.drop_index("ix_adapters_list")
        batch_op.create_index("ix_adapters_created_at", ["created_at"], unique=False)
        batch_op.alter_column("job_id", existing_type=sa.String(), nullable=False)
        batch_op.drop_column("archived_at")
    with op.batch_alter_table("files", schema=None) as batch_op:
        batch_op.drop_index("ix_files_list")
        batch_op.create_index("ix_files_created_at", ["created_at"], unique=False)
    with op.batch_alter_table("job_attempts", schema=None) as batch_op:
        batch_op.drop_index("ix_job_attempts_ended_at")
    with op.batch_alter_table("jobs", schema=None) as batch_op:
        batch_op.drop_index("ix_jobs_project")
        batch_op.create_index("ix_jobs_created_at", ["created_at"], unique=False)
        batch_op.drop_column("reserved_device_seconds")
        batch_op.drop_column("reserved_tokens")
    with op.batch_alter_table("api_keys", schema=None) as batch_op:
        for name in _RATES:
            batch_op.drop_column(name)
    with op.batch_alter_table("projects", schema=None) as batch_op:
        batch_op.drop_constraint(
            batch_op.f("fk_projects_organization_id_organizations"), type_="foreignkey"
        )
        for name in ("organization_id", "share", *_LIMITS, *_RATES):
            batch_op.drop_column(name)
    op.drop_table("organizations")
