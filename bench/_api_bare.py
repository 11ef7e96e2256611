"""What the API is measured against: the same rows from FastAPI alone, no keys, no checks."""

import asyncio
import json
import secrets
import sqlite3
import sys
import threading

import uvicorn
from fastapi import FastAPI, Request

ROWS = 20


def create_bare(path: str) -> FastAPI:
    """Return an application that reads and writes the jobs of a SQLite database."""
    app = FastAPI()
    local = threading.local()

    def database() -> sqlite3.Connection:
        if not hasattr(local, "connection"):
            local.connection = sqlite3.connect(path, isolation_level=None)
            local.connection.execute("PRAGMA synchronous = FULL")
        connection: sqlite3.Connection = local.connection
        return connection

    @app.get("/jobs/{job_id}")
    def retrieve(job_id: str) -> dict[str, object]:
        row = database().execute("SELECT id, status, spec FROM jobs WHERE id = ?", (job_id,))
        found = row.fetchone()
        return {"id": found[0], "status": found[1], **json.loads(found[2])}

    @app.get("/jobs")
    def list_jobs() -> dict[str, object]:
        rows = database().execute(
            "SELECT id, status, spec FROM jobs ORDER BY created_at DESC, id DESC LIMIT ?", (ROWS,)
        )
        data = [{"id": row[0], "status": row[1], **json.loads(row[2])} for row in rows]
        return {"data": data}

    @app.post("/jobs")
    async def create(request: Request) -> dict[str, object]:
        body = await request.json()
        job_id = secrets.token_hex(12)

        def insert() -> None:
            database().execute(
                "INSERT INTO bare (id, spec) VALUES (?, ?)", (job_id, json.dumps(body))
            )

        await asyncio.to_thread(insert)
        return {"id": job_id, **body}

    return app


def main() -> None:
    path, port = sys.argv[1:]
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE IF NOT EXISTS bare (id TEXT PRIMARY KEY, spec TEXT)")
    uvicorn.run(create_bare(path), port=int(port), log_config=None, access_log=False)


if __name__ == "__main__":
    main()
