"""The admin API described in OpenAPI 3.1: made from the routes, and from the structs that they take and give."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from balancer import __version__, domain
from balancer.admin.routing import Parameter, Route
from balancer.admin.shapes import Problem
from balancer.domain import Provider, Rule, ScenarioConfig, Tactic
from balancer.tactics import TACTIC_NAMES, TACTICS, parameters

_REFERENCES = "#/components/schemas/{name}"
_NAMED = re.compile(r"\{(\w+)\}")
_OPTIONAL = {
    Provider.__name__: ("uuid", "name"),
    Rule.__name__: ("uuid", "lb_tactic"),
    ScenarioConfig.__name__: ("scenario",),
}
"""What a document need not say: the path does, or a default."""
_REFUSALS = {
    "400": "The request is malformed, or what it would write is refused: `faults` has all that is wrong, and where.",
    "401": "No token, or one that is not known.",
    "403": "The token's role may not do this.",
    "404": "There is nothing of that name.",
    "405": "The path has other methods; Allow names them.",
    "409": "Others kept publishing in between, or the pick is in no state for this. Try again.",
    "413": "The body is too long.",
    "415": "The body is not application/json.",
    "421": "The request names a host that this server does not answer to.",
    "429": "Every service is at its limits. Retry-After says when it is worth asking again.",
    "500": "A fault of ours; the worker's log has it.",
    "503": "Redis does not answer, or no service can be picked.",
}
_PRECONDITION_REFUSALS = {
    "412": "What stands is something else than If-Match, or If-None-Match, says. Nothing was written.",
    "428": "Neither If-Match nor If-None-Match is there, and what stands could be somebody's edit.",
}
_ETAG = {"ETag": {"description": "What this state of the resource is called.", "schema": {"type": "string"}}}
_PRECONDITIONS = {
    "If-Match": "Write only over this state: the ETag that GET answered, or `*` for whatever stands.",
    "If-None-Match": "`*`: write only what is not there yet.",
}


def described(routes: Sequence[Route]) -> dict[str, Any]:
    """The description of these routes."""
    schemas, components = _schemas(routes)
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, schemas)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Balancer, admin API",
            "version": __version__,
            "description": "Rules, providers and scenarios of the fleet, its counters, and its log of changes.",
        },
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
            "responses": {code: _response(text, schemas[Problem]) for code, text in _all_refusals().items()},
        },
        "security": [{"token": []}],
    }


def _all_refusals() -> dict[str, str]:
    return _REFUSALS | _PRECONDITION_REFUSALS


def _schemas(routes: Iterable[Route]) -> tuple[dict[Any, Any], dict[str, Any]]:
    """A reference for each type of the routes, and what they refer to."""
    kinds = dict.fromkeys([Problem, *(kind for route in routes for kind in (route.takes, route.gives) if kind)])
    found, components = msgspec.json.schema_components(kinds, ref_template=_REFERENCES)
    for name, optional in _OPTIONAL.items():
        if name in components:
            required = [field for field in components[name].get("required", []) if field not in optional]
            components[name].pop("required", None)
            if required:
                components[name]["required"] = required
    for name, schema in components.items():
        if isinstance(getattr(domain, name, None), type):
            components[name] = _lenient_of_null(schema)
    if Tactic.__name__ in components:
        components[Tactic.__name__] = _tactic()
    return dict(zip(kinds, found, strict=True)), components


def _lenient_of_null(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema of what a document holds: null is as good as nothing wherever nothing is."""
    required = schema.get("required", [])
    properties = {
        name: field if name in required else {"anyOf": [field, {"type": "null"}]}
        for name, field in schema.get("properties", {}).items()
    }
    return schema | {"properties": properties} if properties else schema


def _tactic() -> dict[str, Any]:
    """A tactic as a document has it: its name, and the parameters of that one."""
    alternatives = []
    for name, kind in zip(TACTIC_NAMES, TACTICS, strict=True):
        fields = _fields(kind)
        alternatives.append(
            {
                "type": "object",
                "title": name,
                "properties": {
                    "type": {"const": name},
                    "params": {"type": ["object", "null"], "properties": fields},
                },
            }
        )
    return {
        "title": "Tactic",
        "description": "How a service is picked. `type` may also be one of the legacy numbers 0 to 3.",
        "type": "object",
        "properties": {
            "type": {"anyOf": [{"enum": [*TACTIC_NAMES, "", None]}, {"type": "integer", "minimum": 0, "maximum": 3}]},
            "params": {"type": ["object", "null"]},
        },
        "examples": [{"type": name, "params": {}} for name in TACTIC_NAMES],
        "anyOf": [*alternatives, {"properties": {"type": {"enum": ["", None, 0, 1, 2, 3]}}}],
    }


def _fields(kind: type[Tactic]) -> dict[str, Any]:
    schemas = {name: msgspec.json.schema(type_) for name, type_ in parameters(kind).items()}
    return {name: {"anyOf": [schema, {"type": "null"}]} for name, schema in schemas.items()}


def _operation(route: Route, schemas: dict[Any, Any]) -> dict[str, Any]:
    listed = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        for name in _NAMED.findall(route.path)
    ]
    listed += [_parameter(parameter) for parameter in route.query]
    if route.precondition == "writes":
        listed += [
            {"name": name, "in": "header", "description": text, "schema": {"type": "string"}}
            for name, text in _PRECONDITIONS.items()
        ]
    operation: dict[str, Any] = {
        "operationId": _operation_id(route),
        "summary": route.meaning,
        "responses": _responses(route, schemas),
    }
    if route.is_open:
        operation["security"] = []
    else:
        operation["description"] = f"Role: {route.role}."
    if listed:
        operation["parameters"] = listed
    if route.takes:
        operation["requestBody"] = {"required": True, "content": _content(schemas[route.takes])}
    return operation


def _operation_id(route: Route) -> str:
    words = re.sub(r"\W+", "_", _NAMED.sub(r"of_\1", route.path.removeprefix("/api/v1"))).strip("_")
    return f"{route.method.lower()}_{words}"


def _parameter(parameter: Parameter) -> dict[str, Any]:
    schema = msgspec.json.schema(parameter.kind)
    return {"name": parameter.name, "in": "query", "description": parameter.meaning, "schema": schema}


def _responses(route: Route, schemas: dict[Any, Any]) -> dict[str, Any]:
    done = _response("Done.", schemas[route.gives] if route.gives else {"type": "object"})
    responses: dict[str, Any] = {"200": done}
    if route.precondition:
        done["headers"] = _ETAG
    if route.precondition == "reads":
        responses["304"] = {"description": "It is still the state that If-None-Match names.", "headers": _ETAG}
    if route.precondition == "writes" and route.takes:
        responses["201"] = done | {"description": "Made; Location is where."}
    refusals = _all_refusals() if route.precondition == "writes" else _REFUSALS
    if route.path.endswith("/tactic"):
        refusals = refusals | {"412": _PRECONDITION_REFUSALS["412"]}
    if route.is_open:
        refusals = {code: text for code, text in refusals.items() if code in ("400", "405", "421", "500")}
    return responses | {code: {"$ref": f"#/components/responses/{code}"} for code in refusals}


def _response(description: str, schema: Any) -> dict[str, Any]:
    return {"description": description, "content": _content(schema)}


def _content(schema: Any) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}
