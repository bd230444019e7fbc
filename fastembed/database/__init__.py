"""PostgreSQL: who to connect to, a connection that comes back, and a server of our own.

psycopg2 and the embedded server are optional: ``pip install 'fastembed-vision[postgres]'``.
No password is ever part of a message, a repr or a file.
"""

from .config import DatabaseError, DBConfig, database_error, import_psycopg2
from .embedded import DEFAULT_DATABASE, embedded
from .session import Session, get_db_connection, identifier

__all__ = [
    "DEFAULT_DATABASE",
    "DBConfig",
    "DatabaseError",
    "Session",
    "database_error",
    "embedded",
    "get_db_connection",
    "identifier",
    "import_psycopg2",
]
