"""Files and the fleet's configuration: published once, never backwards by accident."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from balancer import document
from balancer.domain import Configuration, Rule
from balancer.errors import ConfigurationError
from balancer.store import connection, keys
from balancer.store.credentials import Credentials, Sealer, is_sealed
from balancer.store.publishing import Publication, plan, publish_file, roll_back
from balancer.store.registry import Registry
from tests.store.test_registry import a_configuration, a_provider, a_rule, edited

KEY = base64.b64encode(b"k" * 32).decode()
OTHER_KEY = base64.b64encode(b"o" * 32).decode()


def a_file(*rules: Rule, **more: Any) -> Configuration:
    """A configuration as it is read from a file."""
    text = msgspec.json.encode(document.write(a_configuration(*rules, **more))).decode()
    return document.read(document.parse(text), door="strict").configuration


def with_token(token: str, **changes: Any) -> Configuration:
    """A file with a literal credential."""
    return a_file(a_rule(services=("a:m",), **changes), providers=(a_provider("a", token=token),))


FIRST = a_file(a_rule(description="first"))
SECOND = a_file(a_rule(description="second"))
THIRD = a_file(a_rule(description="third"))


@pytest.fixture
async def registry(url: str) -> AsyncIterator[Registry]:
    client = connection.client(url)
    yield Registry(client)
    await client.aclose()


async def history(registry: Registry, *files: Configuration) -> None:
    for file in files:
        assert (await publish_file(registry, file, None)).result == "published"


async def standing(registry: Registry) -> Configuration:
    snapshot = await registry.current()
    assert snapshot is not None
    return snapshot.configuration


# -- what becomes of a file --------------------------------------------------------------------------------------------


async def test_the_first_file_is_published(registry: Registry) -> None:
    answer = await publish_file(registry, FIRST, None)
    assert answer == Publication(
        result="published",
        revision=1,
        differences=("+ provider a", "+ provider b", "+ provider c", "+ rule chat"),
    )
    assert await standing(registry) == FIRST


async def test_a_file_equal_to_the_head_changes_nothing(registry: Registry, control: Any) -> None:
    await history(registry, FIRST, SECOND)
    before = await control.hgetall(keys.HEAD)
    for force in (False, True):
        answer = await publish_file(registry, SECOND, None, force=force)
        assert answer == Publication(result="unchanged", revision=2)
    assert await control.hgetall(keys.HEAD) == before
    assert await registry.load(3) is None


async def test_a_new_file_is_published_with_what_differs(registry: Registry) -> None:
    await history(registry, FIRST)
    answer = await publish_file(registry, SECOND, None)
    assert answer == Publication(
        result="published", revision=2, differences=('~ rule chat: description "first" -> "second"',)
    )
    assert await standing(registry) == SECOND


async def test_a_file_that_the_registry_had_before_is_ignored_and_the_standing_revision_is_named(
    registry: Registry,
) -> None:
    await history(registry, FIRST, SECOND, THIRD)
    answer = await publish_file(registry, FIRST, None)
    assert (answer.result, answer.revision, answer.earlier) == ("ignored", 3, 1)
    assert answer.differences == ('~ rule chat: description "third" -> "first"',)
    assert await standing(registry) == THIRD


async def test_a_file_that_the_registry_had_before_is_published_when_forced(registry: Registry) -> None:
    await history(registry, FIRST, SECOND)
    answer = await publish_file(registry, FIRST, None, force=True)
    assert (answer.result, answer.revision) == ("published", 3)
    assert await standing(registry) == FIRST


async def test_after_a_forced_return_the_file_in_between_counts_as_an_earlier_one(registry: Registry) -> None:
    await history(registry, FIRST, SECOND)
    await publish_file(registry, FIRST, None, force=True)
    answer = await publish_file(registry, SECOND, None)
    assert (answer.result, answer.revision, answer.earlier) == ("ignored", 3, 2)
    assert (await publish_file(registry, FIRST, None)).result == "unchanged"


async def test_restarting_old_processes_never_revert_the_fleet(registry: Registry) -> None:
    """A rolling deploy: pods with the old file restart while those with the new one come up."""
    await history(registry, FIRST)
    for file in (SECOND, FIRST, FIRST, SECOND, THIRD, SECOND, FIRST, THIRD):
        await publish_file(registry, file, None)
    assert await standing(registry) == THIRD
    assert (await registry.head()).revision == 3


async def test_replicas_that_bring_one_file_at_once_publish_it_once(url: str) -> None:
    async def start() -> Publication:
        client = connection.client(url)
        try:
            return await publish_file(Registry(client), FIRST, None)
        finally:
            await client.aclose()

    answers = await asyncio.gather(*(start() for _ in range(4)))
    assert sorted(answer.result for answer in answers) == ["published", "unchanged", "unchanged", "unchanged"]
    assert {answer.revision for answer in answers} == {1}


async def test_replicas_of_two_deploys_at_once_end_with_both_files_in_the_history(url: str) -> None:
    async def start(file: Configuration) -> Publication:
        client = connection.client(url)
        try:
            return await publish_file(Registry(client), file, None)
        finally:
            await client.aclose()

    answers = await asyncio.gather(*map(start, (FIRST, SECOND, FIRST, SECOND)))
    assert sorted(a.revision for a in answers if a.result == "published") == [1, 2]
    assert {a.result for a in answers} <= {"published", "unchanged", "ignored"}


async def test_a_refused_file_publishes_nothing(registry: Registry) -> None:
    await history(registry, FIRST)
    with pytest.raises(ConfigurationError, match=r"providers\[a\]\.token"):
        await publish_file(registry, with_token("sk-literal"), None)
    assert await standing(registry) == FIRST


# -- plans -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "force", "result", "revision", "earlier"),
    [
        (SECOND, False, "unchanged", 2, 0),
        (FIRST, False, "ignored", 2, 1),
        (FIRST, True, "published", 3, 0),
        (THIRD, False, "published", 3, 0),
    ],
)
async def test_a_plan_foretells_what_publishing_does_and_does_nothing(
    registry: Registry, file: Configuration, force: bool, result: str, revision: int, earlier: int
) -> None:
    await history(registry, FIRST, SECOND)
    found = await plan(registry, file, None, force=force)
    planned, base = found.publication, found.base
    assert (planned.result, planned.revision, planned.earlier) == (result, revision, earlier)
    assert base is not None
    assert base.revision == (await registry.head()).revision == 2
    assert await publish_file(registry, file, None, force=force) == planned


# -- rolling back ------------------------------------------------------------------------------------------------------


async def test_a_rollback_publishes_what_an_earlier_revision_held(registry: Registry) -> None:
    await history(registry, FIRST, SECOND, THIRD)
    answer = await roll_back(registry, 1)
    assert answer == Publication(
        result="published", revision=4, differences=('~ rule chat: description "third" -> "first"',)
    )
    assert await standing(registry) == FIRST
    assert (await registry.head()).digest == document.digest(FIRST)


async def test_after_a_rollback_no_restarting_process_brings_the_newer_file_back(registry: Registry) -> None:
    await history(registry, FIRST, SECOND)
    await roll_back(registry, 1)
    answer = await publish_file(registry, SECOND, None)
    assert (answer.result, answer.revision, answer.earlier) == ("ignored", 3, 2)
    assert (await publish_file(registry, FIRST, None)).result == "unchanged"
    assert await standing(registry) == FIRST


async def test_a_rollback_to_what_stands_changes_nothing(registry: Registry) -> None:
    await history(registry, FIRST, SECOND)
    assert await roll_back(registry, 2) == Publication(result="unchanged", revision=2)
    assert (await registry.head()).revision == 2


@pytest.mark.parametrize("revision", [0, 2, -1])
async def test_a_rollback_to_a_revision_that_is_not_kept_is_refused(registry: Registry, revision: int) -> None:
    await history(registry, FIRST)
    with pytest.raises(ConfigurationError, match=f"revision {revision} is not kept"):
        await roll_back(registry, revision)


async def test_a_rollback_gives_changed_rules_a_new_revision(registry: Registry) -> None:
    before = a_file(a_rule("x"), a_rule("y"))
    await history(registry, before, edited(before, "x", services=before.rules[0].services[:1]))
    await roll_back(registry, 1)
    snapshot = await registry.current()
    assert snapshot is not None
    assert {uuid: snapshot.rule_revision(uuid) for uuid in "xy"} == {"x": 3, "y": 1}


# -- sealed credentials ------------------------------------------------------------------------------------------------


def token_of(configuration: Configuration) -> str:
    return Credentials(Sealer(KEY)).access_token(configuration.providers[0])


async def test_a_literal_credential_is_published_sealed_and_opens_again(registry: Registry) -> None:
    answer = await publish_file(registry, with_token("sk-literal"), Sealer(KEY))
    assert answer.result == "published"
    stored = await standing(registry)
    assert is_sealed(stored.providers[0].token)
    assert token_of(stored) == "sk-literal"


async def test_the_same_literal_sealed_again_does_not_look_like_a_change(registry: Registry) -> None:
    """Sealing is random: the same file would otherwise differ from the head at every start."""
    await publish_file(registry, with_token("sk-literal"), Sealer(KEY))
    before = await standing(registry)
    assert await publish_file(registry, with_token("sk-literal"), Sealer(KEY)) == Publication(
        result="unchanged", revision=1
    )
    answer = await publish_file(registry, with_token("sk-literal", description="new"), Sealer(KEY))
    assert answer.differences == ('~ rule chat: description (default) -> "new"',)
    assert (await standing(registry)).providers == before.providers


async def test_a_new_literal_is_a_change_that_is_told_without_its_value(registry: Registry) -> None:
    await publish_file(registry, with_token("sk-old"), Sealer(KEY))
    answer = await publish_file(registry, with_token("sk-new"), Sealer(KEY))
    assert answer == Publication(result="published", revision=2, differences=("~ provider a: token changed",))
    assert token_of(await standing(registry)) == "sk-new"


async def test_a_rolled_back_credential_opens(registry: Registry) -> None:
    await publish_file(registry, with_token("sk-old"), Sealer(KEY))
    await publish_file(registry, with_token("sk-new"), Sealer(KEY))
    await roll_back(registry, 1)
    assert token_of(await standing(registry)) == "sk-old"


async def test_after_a_change_of_the_key_a_forced_file_is_sealed_anew(registry: Registry) -> None:
    await publish_file(registry, with_token("sk-literal"), Sealer(OTHER_KEY))
    answer = await publish_file(registry, with_token("sk-literal"), Sealer(KEY), force=True)
    assert answer.result == "published"
    assert token_of(await standing(registry)) == "sk-literal"


async def test_a_document_of_the_fleet_applied_again_with_its_sealed_values_is_unchanged(registry: Registry) -> None:
    """`get` shows what stands; giving it back changes nothing, and needs no key."""
    await publish_file(registry, with_token("sk-literal"), Sealer(KEY))
    text = msgspec.json.encode(document.write(await standing(registry))).decode()
    again = document.read(document.parse(text), door="strict").configuration
    assert await publish_file(registry, again, None) == Publication(result="unchanged", revision=1)
