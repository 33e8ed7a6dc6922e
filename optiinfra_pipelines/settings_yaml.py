"""fleet.yaml as text -> plain values that remember their line: the YAML half of `optiinfra_pipelines.settings`.

Pure. Every scalar stays the text that was written, and the field it lands in decides what it is: `name: on` is the
name "on", `local: on` is true, `collect_seconds: 1:30` is an error and not YAML 1.1's 90. A key without a value is
as good as absent. `${NAME}` is replaced from the environment that is handed in.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import yaml

Value = str | list["Value"] | dict[str, "Value"]
KeyPath = tuple[str | int, ...]

_VARIABLE = re.compile(r"\$\{([^}]*)\}?")
_VARIABLE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
_PLAIN_TAGS = {
    f"tag:yaml.org,2002:{kind}"
    for kind in ("str", "int", "float", "bool", "null", "timestamp", "value", "merge", "seq", "map")
}
_NULL_TAG = "tag:yaml.org,2002:null"
# A fleet of 1,000 targets has some 10,000 nodes; aliases that unfold into more are a mistake or an attack.
MAX_NODES = 1_000_000


class Problem(NamedTuple):
    """One thing wrong with fleet.yaml: where (both from 1), the key's path as `targets[3].url`, what and the remedy."""

    line: int
    column: int
    key: str
    message: str


class Place(NamedTuple):
    """Line and column, both from 1."""

    line: int
    column: int


@dataclass
class Document:
    """What fleet.yaml says.

    places: where each key path stands. written: each scalar as it stands there, before `${NAME}` was replaced, which is
    all that a message may show. faulty: key paths already complained about. silent: keys without a value.
    """

    value: dict[str, Value] = field(default_factory=dict)
    places: dict[KeyPath, Place] = field(default_factory=dict)
    written: dict[KeyPath, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    faulty: set[KeyPath] = field(default_factory=set)
    silent: list[KeyPath] = field(default_factory=list)

    def place(self, path: KeyPath) -> Place:
        """Where the key stands, or the nearest thing that holds it."""
        while path not in self.places and path:
            path = path[:-1]
        return self.places.get(path, Place(1, 1))

    def complain(self, path: KeyPath, message: str) -> None:
        self.faulty.add(path)
        self.problems.append(Problem(*self.place(path), key_text(path), message))


def key_text(path: KeyPath) -> str:
    """`("targets", 3, "url")` -> `targets[3].url`; entries count from 0, as in the list."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def read_document(text: str, environ: Mapping[str, str]) -> Document:
    """Parse `text`; whatever is wrong is in `problems`, and the rest of the document is there nevertheless."""
    document = Document()
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        document.problems.append(_syntax_problem(error))
        return document
    except RecursionError:
        document.problems.append(Problem(1, 1, "", "nests lists or mappings hundreds deep; is it the right file?"))
        return document
    except yaml.YAMLError as error:  # a character YAML forbids
        document.problems.append(Problem(1, 1, "", f"not YAML: {' '.join(str(error).split())}"))
        return document
    if root is None or (isinstance(root, yaml.ScalarNode) and root.tag == _NULL_TAG):
        document.problems.append(
            Problem(1, 1, "", "the file is empty; to watch this host, write:  hosts: [{name: localhost, local: true}]")
        )
    elif not isinstance(root, yaml.MappingNode):
        document.places[()] = _place(root)
        document.complain((), "wants `key: value` lines at the top, such as `targets:`; this is something else")
    else:
        reader = _Reader(document, environ)
        value = reader.read(root, (), ())
        document.value = value if isinstance(value, dict) else {}
    return document


def _place(node: yaml.Node) -> Place:
    return Place(node.start_mark.line + 1, node.start_mark.column + 1)


def _syntax_problem(error: yaml.MarkedYAMLError) -> Problem:
    mark = error.problem_mark or error.context_mark
    what = f"not YAML: {error.problem or error.context or 'cannot be read'}"
    if error.context and error.context_mark and error.problem:
        what += f", {error.context} that began on line {error.context_mark.line + 1}"
    if "'\\t'" in (error.problem or "") or "\\t" in (error.problem or ""):
        what += "; indent with spaces, YAML allows no tabs"
    elif "single document" in (error.context or ""):
        what += "; remove the line with ---"
    elif "mapping values are not allowed" in (error.problem or ""):
        what += "; quote a value that holds ': ', and indent the keys of one entry alike"
    else:
        what += "; quote values with special characters, and indent the keys of one entry alike"
    return Problem(mark.line + 1 if mark else 1, mark.column + 1 if mark else 1, "", what)


class _Reader:
    """Walks the node tree once, collecting values, places and problems."""

    def __init__(self, document: Document, environ: Mapping[str, str]) -> None:
        self._document = document
        self._environ = environ
        self._nodes = 0

    def read(self, node: yaml.Node, path: KeyPath, above: tuple[int, ...]) -> Value | None:
        """The node's value; None where it says nothing. `above`: identities of the nodes around it."""
        self._document.places.setdefault(path, _place(node))
        self._nodes += 1
        if id(node) in above or self._nodes > MAX_NODES:
            self._document.complain(path, "an alias that holds itself, or unfolds without end; write the values out")
            return None
        if node.tag not in _PLAIN_TAGS:
            self._document.complain(path, f"has the tag {node.tag!r}; write the plain value")
            return None
        above = (*above, id(node))
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path, above)
        if isinstance(node, yaml.SequenceNode):
            entries = [self.read(entry, (*path, index), above) for index, entry in enumerate(node.value)]
            return ["" if entry is None else entry for entry in entries]
        return self._scalar(node, path)

    def _mapping(self, node: yaml.MappingNode, path: KeyPath, above: tuple[int, ...]) -> dict[str, Value]:
        values: dict[str, Value] = {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self._document.complain(path, "a key is a list or a mapping; a key is a word")
                continue
            key = str(key_node.value)
            here = (*path, key)
            if key in lines:
                self._document.problems.append(
                    Problem(
                        *_place(key_node), key_text(here), f"is written twice, first on line {lines[key]}; keep one"
                    )
                )
                continue
            lines[key] = _place(key_node).line
            self._document.places[here] = _place(key_node)
            value = self.read(value_node, here, above)
            if value is not None:
                values[key] = value
            elif value_node.tag == _NULL_TAG:
                self._document.silent.append(here)
        return values

    def _scalar(self, node: yaml.Node, path: KeyPath) -> str | None:
        if node.tag == _NULL_TAG:
            return None
        text = str(node.value)
        self._document.written[path] = text
        return self._replace_variables(text, path)

    def _replace_variables(self, text: str, path: KeyPath) -> str | None:
        if "${" not in text:
            return text
        is_complete = True

        def value_of(match: re.Match[str]) -> str:
            nonlocal is_complete
            name = match[1]
            if not _VARIABLE_NAME.match(name) or not match[0].endswith("}"):
                message = "holds a ${ that is no ${NAME}; a name is letters, digits and _ (no defaults, no nesting)"
            elif name not in self._environ:
                message = f"names ${{{name}}}, and the environment has no {name}; export it before starting"
            elif not self._environ[name].strip():
                message = f"names ${{{name}}}, and {name} is set but empty; export its value before starting"
            elif any(not character.isprintable() for character in self._environ[name]):
                message = f"names ${{{name}}}, whose value has a line break or another control character; remove it"
            else:
                return self._environ[name]
            is_complete = False
            self._document.complain(path, message)
            return ""

        replaced = _VARIABLE.sub(value_of, text)
        return replaced if is_complete else None
