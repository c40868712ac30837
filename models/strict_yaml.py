"""Reads YAML as its specification has it: a mapping has each key once, where PyYAML would keep the last one."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any

MERGE_TAG = "tag:yaml.org,2002:merge"  # of `<<`, which takes nothing from another one


def load_yaml(text: str) -> Any:
    """Return the plain values of a YAML document; None of an empty one.

    >>> load_yaml("{a: 1, b: [2, 3]}")
    {'a': 1, 'b': [2, 3]}

    Raises:
        ValueError: If it is no YAML, or gives a key twice; the message names the line.
    """
    import yaml

    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        if root is None:
            return None
        for keys in _keys_of_mappings(root):
            _refuse_doubles([(loader.construct_object(key), key.start_mark.line + 1) for key in keys])
        return loader.construct_document(root)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def _keys_of_mappings(root: Any) -> Iterator[list[Any]]:
    """Yield the nodes of each mapping's keys, as far as they are plain words or numbers."""
    from yaml import MappingNode, ScalarNode, SequenceNode

    todo, seen = [root], set()  # an alias is the node itself, and may stand within it
    while todo:
        node = todo.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, SequenceNode):
            todo += node.value
        elif isinstance(node, MappingNode):
            todo += [value for _, value in node.value]
            yield [key for key, _ in node.value if isinstance(key, ScalarNode) and key.tag != MERGE_TAG]


def _refuse_doubles(keys: list[tuple[Hashable, int]]) -> None:
    """Raise where one of the keys, each with its line, stands twice."""
    lines: dict[Hashable, int] = {}
    for key, line in keys:
        if key in lines:
            raise ValueError(
                f"line {line}: the key {key!r} stands twice, first in line {lines[key]}; expected each key once, as "
                "only one of the two would count"
            )
        lines[key] = line
