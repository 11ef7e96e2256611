"""keys: scopes and an end; a key that was there before may do everything, as before.

Revision: 0004_key_scopes, after 0003
"""

import sqlalchemy as sa
from alembic import op

revision = "0004_key_scopes"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("api_keys", schema=None) as batch_op:
        batch_op.add_column(sa.Column("scopes", sa.JSON(), nullable=True))
        batch_op.add_column(sa.Column("expires_at", sa.Double(), nullable=True))
    op.execute("UPDATE api_keys SET scopes = '[\"admin\"]'")
    with op.batch_alter_table("api_keys", schema=None) as batch_op:
        batch_op.alter_column("scopes", existing_type=sa.JSON(), nullable=False)


def downgrade() -> None:
    # A key that may do less must not become one that may do everything.
    op.execute("DELETE FROM api_keys WHERE CAST(scopes AS TEXT) != '[\"admin\"]'")
    with op.batch_alter_table("api_keys", schema=None) as batch_op:
        batch_op.drop_column("expires_at")
        batch_op.drop_column("scopes")
