"""training: jobs that pause; shapes, probes, estimates and what was measured.

Revision: 0003, after 0002
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("jobs", schema=None) as batch_op:
        batch_op.add_column(
            sa.Column("pause_requested", sa.Boolean(), nullable=False, server_default=sa.false())
        )
    with op.batch_alter_table("jobs", schema=None) as batch_op:
        batch_op.alter_column("pause_requested", server_default=None)
        batch_op.add_column(sa.Column("estimate", sa.JSON(), nullable=True))
        batch_op.add_column(sa.Column("measured", sa.JSON(), nullable=True))
    with op.batch_alter_table("base_models", schema=None) as batch_op:
        batch_op.add_column(sa.Column("shape", sa.JSON(), nullable=True))
    op.create_table(
        "base_probes",
        sa.Column("base_model", sa.String(), nullable=False),
        sa.Column("precision", sa.String(), nullable=False),
        sa.Column("values", sa.JSON(), nullable=True),
        sa.Column("claimed_until", sa.Double(), nullable=True),
        sa.Column("failure", sa.String(), nullable=True),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(
            ["base_model"], ["base_models.name"], name=op.f("fk_base_probes_base_model_base_models")
        ),
        sa.PrimaryKeyConstraint("base_model", "precision", name=op.f("pk_base_probes")),
    )
    with op.batch_alter_table("base_probes", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_base_probes_created_at"), ["created_at"], unique=False)


def downgrade() -> None:
    op.drop_table("base_probes")
    with op.batch_alter_table("base_models", schema=None) as batch_op:
        batch_op.drop_column("shape")
    with op.batch_alter_table("jobs", schema=None) as batch_op:
        for name in ("pause_requested", "estimate", "measured"):
            batch_op.drop_column(name)
