"""long lists: no index on the time alone, along which PostgreSQL would read other projects' rows.

Revision: 0011_listed, after 0010_page_indexes
"""

from alembic import op

revision = "0011_listed"
down_revision = "0010_page_indexes"
branch_labels = None
depends_on = None

_TABLES = ("jobs", "files", "adapters", "audit_logs")


def upgrade() -> None:
    for table in _TABLES:
        op.drop_index(f"ix_{table}_created_at", table)


def downgrade() -> None:
    for table in _TABLES:
        op.create_index(f"ix_{table}_created_at", table, ["created_at"])
