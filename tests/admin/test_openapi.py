"""The description of the admin API: valid OpenAPI, true of what is answered, and no fuzzer finds it wrong."""

from __future__ import annotations

import os
from pathlib import Path

import openapi_schema_validator
import openapi_spec_validator
import pytest

from tests.admin.conftest import LIVE, RULE, Admin, of
from tests.admin.fuzzing import fuzz
from tests.admin.test_resources import PROVIDERS, RULES, path, read

FUZZ_S = 7


async def test_it_is_valid_and_names_every_route(admin: Admin) -> None:
    description = await admin.get("/openapi.json")
    openapi_spec_validator.validate(description)
    ids = [operation["operationId"] for methods in description["paths"].values() for operation in methods.values()]
    assert len(ids) == len(set(ids)) > 25
    for methods in description["paths"].values():
        for operation in methods.values():
            assert operation["summary"]
            assert operation.get("security") == [] or operation["description"].startswith("Role: ")


async def test_answers_are_as_described(admin: Admin) -> None:
    await admin.settle((await admin.pick())["hold"])
    description = await admin.get("/openapi.json")
    for template, place in (
        ("/api/v1/rules", RULES),
        ("/api/v1/rules/{rule}", path(RULE)),
        ("/api/v1/providers", PROVIDERS),
        ("/api/v1/audit", "/api/v1/audit"),
        ("/api/v1/decisions", "/api/v1/decisions"),
        (f"{LIVE}/stats", f"{LIVE}/stats"),
        (f"{LIVE}/rules/{{rule}}", of(RULE)),
        (f"{LIVE}/rules/{{rule}}/current-service", f"{of(RULE)}/current-service"),
    ):
        answered = description["paths"][template]["get"]["responses"]["200"]
        schema = answered["content"]["application/json"]["schema"]
        root = {"components": description["components"], **schema}
        openapi_schema_validator.validate(await admin.get(place), root)


async def test_it_is_made_from_the_structs(admin: Admin) -> None:
    schemas = (await admin.get("/openapi.json"))["components"]["schemas"]
    rule, _ = await read(admin, path(RULE))
    assert rule.keys() <= schemas["Rule"]["properties"].keys()
    assert schemas["Rule"]["required"] == ["request_model"]
    assert schemas["Rule"]["properties"]["scenario"]["anyOf"][0]["enum"] == [
        "anthropic",
        "claude_code",
        "openai",
        "opencode",
    ]


async def test_a_fuzzer_finds_no_fault_in_the_server_nor_in_its_description(
    admin: Admin, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """No 5xx, answers as described, no route without its token, and more; `make fuzz-admin` takes its time.

    What fits the schemas may still be refused (it may name a provider that there is not), so that is not checked; and
    in the short run not either that all is refused that does not fit them: how far that comes depends on the machine.
    """
    given = os.environ.get("BALANCER_TEST_FUZZ_S")
    unchecked = ["positive_data_acceptance"] if given else ["positive_data_acceptance", "negative_data_rejection"]
    status, printed = await fuzz(admin, tmp_path, int(given or FUZZ_S), *unchecked)
    assert status == 0, printed[-8000:]
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []
