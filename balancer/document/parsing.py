"""The text of a configuration: YAML or JSON, in which no key is written twice. Dates stay the text that they are."""

from __future__ import annotations

import json
from typing import Any

import yaml

from balancer.errors import ConfigurationError

_MERGE = "tag:yaml.org,2002:merge"
_TIMESTAMP = "tag:yaml.org,2002:timestamp"


class _Loader(yaml.SafeLoader):
    """Safe YAML in which a key may not be written twice, and a date is text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping, refused when a key repeats."""
        seen = set()
        for key_node, _ in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) and key_node.tag != _MERGE else None
            if key is not None and key in seen:
                raise yaml.MarkedYAMLError(None, None, f"the key {key!r} is written twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _TIMESTAMP]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class _RepeatedKeyError(Exception):
    """A JSON object has a key twice."""


def parse(text: str, name: str = "document") -> Any:
    """What YAML or JSON text holds. Raises ConfigurationError, with the line of a fault."""
    try:
        if text.lstrip()[:1] in ("{", "["):
            repeated = ""
            try:
                return json.loads(text, object_pairs_hook=_object, parse_constant=_refuse)
            except _RepeatedKeyError as exc:
                repeated = str(exc)
            except ValueError:
                pass  # A flow mapping of YAML begins alike.
            value = _yaml(text, name)  # It knows the line.
            if repeated:
                raise ConfigurationError(f"{name}: the key {repeated!r} is written twice")
            return value
        return _yaml(text, name)
    except RecursionError as exc:
        raise ConfigurationError(f"{name} is nested too deeply, or holds itself") from exc


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        raise _RepeatedKeyError(next(name for name in names if names.count(name) > 1))
    return value


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is no JSON")


def _yaml(text: str, name: str) -> Any:
    try:
        return _plain(yaml.load(text, Loader=_Loader))  # noqa: S506 - a SafeLoader that is stricter still
    except yaml.MarkedYAMLError as exc:
        where = f"{name}, line {exc.problem_mark.line + 1}" if exc.problem_mark else name
        raise ConfigurationError(f"{where}: {exc.problem}") from exc
    except (yaml.YAMLError, ValueError) as exc:
        raise ConfigurationError(f"{name} is no valid YAML: {exc}") from exc


def _plain(value: Any) -> Any:
    """The value with text for keys. Raises RecursionError for one that holds itself."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value
