"""Which relations a query reads, by DuckDB's own parser.

Pure. A name bound by WITH in scope is not a relation; a table macro stands for what its body reads.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import duckdb


def relations_read(con: duckdb.DuckDBPyConnection, sql: str, table_macros: Mapping[str, str]) -> tuple[str, ...]:
    """Names of the tables and views that one SELECT reads, sorted.

    ValueError with the parser's words where `sql` is not one SELECT.
    """
    row = con.execute("select json_serialize_sql(?::varchar)", [sql]).fetchone()
    tree = json.loads(row[0]) if row else {}
    if tree.get("error"):
        raise ValueError(str(tree.get("error_message", "not a SELECT")))
    if len(tree["statements"]) != 1:
        raise ValueError(f"{len(tree['statements'])} statements where one SELECT is expected")
    read: set[str] = set()
    for kind, name in _references(tree["statements"][0]["node"], frozenset()):
        if kind == "relation":
            read.add(name)
        elif name in table_macros:
            read.update(relations_read(con, table_macros[name], table_macros))
    return tuple(sorted(read))


def _references(node: Any, bound: frozenset[str]) -> Iterator[tuple[str, str]]:
    """('relation' | 'function', name) for all that a parsed node reads and no WITH around it has bound."""
    if isinstance(node, list):
        for part in node:
            yield from _references(part, bound)
        return
    if not isinstance(node, dict):
        return
    kind = node.get("type")
    if kind == "BASE_TABLE":
        name = str(node["table_name"])
        if node.get("schema_name") or name.lower() not in bound:
            yield "relation", name
    elif kind == "TABLE_FUNCTION":
        yield "function", str(node["function"]["function_name"])
    if kind == "RECURSIVE_CTE_NODE":
        bound = bound | {str(node["cte_name"]).lower()}
    for entry in node.get("cte_map", {}).get("map", []):
        yield from _references(entry["value"], bound)
        bound = bound | {str(entry["key"]).lower()}
    for key, part in node.items():
        if key != "cte_map":
            yield from _references(part, bound)
