"""Creates the tables for MCP servers and their tools."""

from __future__ import annotations

from typing import Any

import peewee
from peewee import Model


def up(migrator: Any, db: Any) -> None:
    class McpServer(Model):
        name = peewee.CharField(max_length=64, primary_key=True)
        version = peewee.IntegerField()
        transport = peewee.CharField(max_length=8)
        url = peewee.TextField()
        headers_secret = peewee.CharField(max_length=200, null=True)
        enabled = peewee.BooleanField()
        last_error = peewee.TextField(null=True)
        listed_at = peewee.CharField(max_length=24, null=True)
        ignored_tools = peewee.TextField()
        created_at = peewee.CharField(max_length=24)
        updated_at = peewee.CharField(max_length=24)

        class Meta:
            database = db
            legacy_table_names = False
            table_name = "tools_mcp_servers"

    class McpTool(Model):
        name = peewee.CharField(max_length=200, primary_key=True)
        server = peewee.CharField(max_length=64)
        remote_name = peewee.CharField(max_length=128)
        definition = peewee.TextField()
        definition_sha256 = peewee.CharField(max_length=64)
        accepted_sha256 = peewee.CharField(max_length=64, null=True)
        is_listed = peewee.BooleanField()

        class Meta:
            database = db
            legacy_table_names = False
            table_name = "tools_mcp_tools"
            indexes = ((("server", "name"), False),)

    db.create_tables([McpServer, McpTool])
