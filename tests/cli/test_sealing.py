"""`secrets rotate`, as a person runs it between two deployments."""

from __future__ import annotations

import base64

import pytest
import redis

from balancer.store.credentials import Sealer
from tests.cli.conftest import SEALING_KEY, Run, Write, a_document

NEW = base64.b64encode(b"n" * 32).decode()


def kept(url: str) -> str:
    with redis.Redis.from_url(url) as client:
        return repr([client.get(key) for key in client.scan_iter("balancer:{registry}:snapshot:*")])


def test_after_it_the_old_key_is_needed_no_more(
    on_store: Run, write: Write, store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert on_store("apply", write(a_document(token="sk-literal"))).status == 0
    assert f"sealed:v2:{Sealer(SEALING_KEY).key_id}" in kept(store_url)
    monkeypatch.setenv("BALANCER_SECRET_KEY", NEW)
    monkeypatch.setenv("BALANCER_SECRET_KEY_ALSO", SEALING_KEY)

    ran = on_store("secrets", "rotate")

    assert (ran.status, ran.err) == (0, "")
    assert "revision 2 stands; sealed anew: 1 earlier ones, 0 grants" in ran.out
    assert Sealer(NEW).key_id in ran.out
    assert f"sealed:v2:{Sealer(SEALING_KEY).key_id}" not in kept(store_url)
    monkeypatch.delenv("BALANCER_SECRET_KEY_ALSO")
    assert "revision 2 is the same" in on_store("apply", write(a_document(token="sk-literal"))).out


def test_without_the_old_key_it_says_which_is_missing(
    on_store: Run, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert on_store("apply", write(a_document(token="sk-literal"))).status == 0
    monkeypatch.setenv("BALANCER_SECRET_KEY", NEW)
    ran = on_store("secrets", "rotate")
    assert ran.status == 1
    assert "BALANCER_SECRET_KEY_ALSO" in ran.err


def test_without_a_key_there_is_nothing_to_seal_with(on_store: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BALANCER_SECRET_KEY")
    ran = on_store("secrets", "rotate")
    assert ran.status == 1
    assert "there is no key to seal with" in ran.err
