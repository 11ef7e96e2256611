"""data sets: what the lint makes of a file, shared content, uploads in parts.

Revision: 0002, after 0001
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_NEW_COLUMNS = ("findings_key", "rows_key", "cleaned_key", "data_sha256")


def upgrade() -> None:
    with op.batch_alter_table("files", schema=None) as batch_op:
        batch_op.add_column(sa.Column("object_key", sa.String(), nullable=True))
        batch_op.add_column(sa.Column("options", sa.JSON(), nullable=True))
        for name in _NEW_COLUMNS:
            batch_op.add_column(sa.Column(name, sa.String(), nullable=True))
    # Data sets that were linted before have no rows in the new form: they are linted once more.
    op.execute("UPDATE files SET object_key = 'files/' || id")
    op.execute(
        "UPDATE files SET status = 'uploaded', report = NULL, status_details = NULL "
        "WHERE purpose = 'fine-tune'"
    )
    with op.batch_alter_table("files", schema=None) as batch_op:
        batch_op.alter_column("object_key", existing_type=sa.String(), nullable=False)
        batch_op.create_index(batch_op.f("ix_files_object_key"), ["object_key"], unique=False)
        batch_op.create_index("ix_files_content", ["project_id", "sha256"], unique=False)

    op.create_table(
        "uploads",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("project_id", sa.String(), nullable=False),
        sa.Column("purpose", sa.String(), nullable=False),
        sa.Column("filename", sa.String(), nullable=False),
        sa.Column("mime_type", sa.String(), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("status", sa.String(), nullable=False),
        sa.Column("expires_at", sa.Double(), nullable=False),
        sa.Column("file_id", sa.String(), nullable=True),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(
            ["project_id"], ["projects.id"], name=op.f("fk_uploads_project_id_projects")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_uploads")),
    )
    with op.batch_alter_table("uploads", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_uploads_created_at"), ["created_at"], unique=False)
        batch_op.create_index(batch_op.f("ix_uploads_project_id"), ["project_id"], unique=False)
        batch_op.create_index(batch_op.f("ix_uploads_status"), ["status"], unique=False)

    op.create_table(
        "upload_parts",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("upload_id", sa.String(), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(
            ["upload_id"], ["uploads.id"], name=op.f("fk_upload_parts_upload_id_uploads")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_upload_parts")),
    )
    with op.batch_alter_table("upload_parts", schema=None) as batch_op:
        batch_op.create_index(
            batch_op.f("ix_upload_parts_created_at"), ["created_at"], unique=False
        )
        batch_op.create_index(batch_op.f("ix_upload_parts_upload_id"), ["upload_id"], unique=False)


def downgrade() -> None:
    op.drop_table("upload_parts")
    op.drop_table("uploads")
    with op.batch_alter_table("files", schema=None) as batch_op:
        batch_op.drop_index("ix_files_content")
        batch_op.drop_index(batch_op.f("ix_files_object_key"))
        for name in (*_NEW_COLUMNS, "options", "object_key"):
            batch_op.drop_column(name)
