"""Credentials: sealed at their place, references resolved in the worker, nothing secret in the clear."""

from __future__ import annotations

import base64
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

from balancer import document
from balancer.config import load
from balancer.domain import Configuration, OAuthDetail, Outcome, Provider, Usage
from balancer.errors import ConfigurationError
from balancer.store.balance import Balance
from balancer.store.credentials import Credentials, Sealer, is_sealed, seal_configuration
from balancer.store.publishing import publish_file
from tests.store.test_registry import a_configuration, a_provider, a_rule

KEY = base64.b64encode(b"k" * 32).decode()
OTHER_KEY = base64.b64encode(b"o" * 32).decode()
PLACE = ("eu", "token")

SECRETS = {
    "token": "sk-token-1",
    "access_token": "at-access-2",
    "refresh_token": "rt-refresh-3",
    "Authorization": "Bearer sk-header-4",
    "X-Api-Key": "sk-header-5",
    "Cookie": "session=sk-header-6",
    "key": "sk-query-7",
    "proxy_url": "socks5://user:sk-proxy-8@127.0.0.1:1080",
}


def a_secretive_provider(**more: Any) -> Provider:
    """A provider with a literal credential wherever one may stand, and other values beside them."""
    values: dict[str, Any] = {
        "token": SECRETS["token"],
        "oauth_detail": OAuthDetail(access_token=SECRETS["access_token"], refresh_token=SECRETS["refresh_token"]),
        "headers": {name: SECRETS[name] for name in ("Authorization", "X-Api-Key", "Cookie")} | {"X-Region": "eu"},
        "query": {"key": SECRETS["key"], "api-version": "2026-01-01"},
        "proxy_url": SECRETS["proxy_url"],
    }
    return a_provider("eu", **(values | more))


def of(*providers: Provider) -> Configuration:
    return Configuration(providers=providers)


def sealed(provider: Provider) -> Provider:
    return seal_configuration(of(provider), Sealer(KEY)).providers[0]


def text_of(value: Any) -> str:
    return msgspec.json.encode(value).decode() + repr(value)


# -- sealing -----------------------------------------------------------------------------------------------------------


def test_what_is_sealed_opens_with_the_same_key_at_the_same_place() -> None:
    value = Sealer(KEY).seal("sk-löng ✓", PLACE)
    assert is_sealed(value)
    assert "sk-l" not in value
    assert Sealer(KEY).open(value, PLACE) == "sk-löng ✓"


def test_the_same_value_never_seals_to_the_same_text() -> None:
    assert len({Sealer(KEY).seal("sk", PLACE) for _ in range(20)}) == 20


@pytest.mark.parametrize("place", [("us", "token"), ("eu", "oauth_detail.access_token"), ("eu\ntoken", ""), ("", "")])
def test_a_sealed_value_does_not_open_at_another_place(place: tuple[str, str]) -> None:
    value = Sealer(KEY).seal("sk-secret", PLACE)
    with pytest.raises(ConfigurationError, match="cannot be opened") as caught:
        Sealer(KEY).open(value, place)
    assert f"providers[{place[0]}].{place[1]}" in caught.value.message


def test_another_key_is_refused_with_the_place_and_the_settings_name() -> None:
    value = Sealer(OTHER_KEY).seal("sk-secret", PLACE)
    with pytest.raises(ConfigurationError, match=r"providers\[eu\]\.token: .*BALANCER_SECRET_KEY") as caught:
        Sealer(KEY).open(value, PLACE)
    assert "sk-secret" not in str(caught.value)


@pytest.mark.parametrize("damage", ["", "AAAA", "no base64!", "é"])
def test_a_damaged_value_is_refused_with_its_place(damage: str) -> None:
    with pytest.raises(ConfigurationError, match=r"providers\[eu\]\.token"):
        Sealer(KEY).open(f"sealed:v1:{damage}", PLACE)


@pytest.mark.parametrize(
    "key", ["", "sk-not-base64!", base64.b64encode(b"x" * 31).decode(), base64.b64encode(b"x" * 33).decode(), "k" * 32]
)
def test_what_is_no_key_of_32_bytes_is_refused_without_showing_it(key: str) -> None:
    with pytest.raises(ConfigurationError, match="BALANCER_SECRET_KEY: expected 32 bytes in base64") as caught:
        Sealer(key)
    assert not key or key not in caught.value.message


def test_a_second_key_opens_what_it_has_sealed_and_seals_nothing() -> None:
    old, both = Sealer(OTHER_KEY), Sealer(KEY, OTHER_KEY)
    value = old.seal("sk-secret", PLACE)
    assert both.open(value, PLACE) == "sk-secret"
    assert Sealer(KEY).open(both.seal("sk-secret", PLACE), PLACE) == "sk-secret"
    assert (both.is_current(value), both.is_current(both.resealed(value, PLACE))) == (False, True)
    assert both.resealed("${ENV}", PLACE) == "${ENV}"


def test_what_was_sealed_before_keys_had_ids_opens_with_either_key_and_is_sealed_anew() -> None:
    for key in (KEY, OTHER_KEY):
        value = Sealer(key).seal("sk-secret", PLACE)
        older = f"sealed:v1:{value.rpartition(':')[2]}"
        both = Sealer(KEY, OTHER_KEY)
        assert both.open(older, PLACE) == "sk-secret"
        assert both.is_current(both.resealed(older, PLACE))


def test_a_key_that_is_missing_is_named_by_its_id() -> None:
    other = Sealer(OTHER_KEY)
    with pytest.raises(ConfigurationError, match=f"whose id is {other.key_id}"):
        Sealer(KEY).open(other.seal("sk-secret", PLACE), PLACE)


def test_a_second_key_that_is_none_is_refused_by_its_own_name() -> None:
    with pytest.raises(ConfigurationError, match="BALANCER_SECRET_KEY_ALSO: expected 32 bytes"):
        Sealer(KEY, "short")


# -- a configuration ---------------------------------------------------------------------------------------------------


def test_what_lies_deeper_in_the_fields_of_oauth_is_sealed_too() -> None:
    fields = {"client_secret": "s-1", "token_url": "https://a.invalid/t", "more": [{"api_key": "s-2", "name": "n"}]}
    detail = sealed(a_provider("eu", oauth_detail=OAuthDetail(extra_fields=fields))).oauth_detail
    assert detail is not None
    assert is_sealed(detail.extra_fields["client_secret"])
    assert is_sealed(detail.extra_fields["more"][0]["api_key"])
    assert (detail.extra_fields["token_url"], detail.extra_fields["more"][0]["name"]) == (fields["token_url"], "n")


def test_a_provider_whose_tokens_are_renewed_is_refused_without_a_key() -> None:
    detail = OAuthDetail(refresh_token="${R}", provider_type="anthropic")
    with pytest.raises(ConfigurationError, match=r"providers\[eu\].oauth_detail: its tokens are renewed"):
        seal_configuration(of(a_provider("eu", token="", auth_type="oauth", oauth_detail=detail)), None)


def test_every_literal_credential_is_sealed_and_the_rest_stays() -> None:
    provider = sealed(a_secretive_provider())
    assert not [secret for secret in SECRETS.values() if secret in text_of(provider)]
    assert provider.oauth_detail is not None
    values = [
        provider.token,
        provider.oauth_detail.access_token,
        provider.oauth_detail.refresh_token,
        *(provider.headers[name] for name in ("Authorization", "X-Api-Key", "Cookie")),
        provider.query["key"],
        provider.proxy_url,
    ]
    assert all(map(is_sealed, values))
    assert (provider.headers["X-Region"], provider.query["api-version"]) == ("eu", "2026-01-01")
    assert provider.api_base == a_secretive_provider().api_base


def test_a_worker_with_the_key_reads_every_credential() -> None:
    plain, provider = a_secretive_provider(), sealed(a_secretive_provider())
    credentials = Credentials(Sealer(KEY))
    assert credentials.access_token(provider) == SECRETS["token"]
    assert credentials.headers(provider) == plain.headers
    assert credentials.query(provider) == plain.query
    assert credentials.proxy_url(provider) == SECRETS["proxy_url"]
    oauth = sealed(a_secretive_provider(auth_type="oauth"))
    assert credentials.access_token(oauth) == SECRETS["access_token"]


def test_a_client_secret_among_the_oauth_fields_is_sealed() -> None:
    """An OAuth client's secret is a credential like any other."""
    fields = {"token_url": "https://upstream.invalid/token", "client_id": "c", "client_secret": "cs-secret-9"}
    detail = OAuthDetail(access_token="${AT}", extra_fields=fields)
    provider = sealed(a_provider("eu", auth_type="oauth", oauth_detail=detail))
    assert "cs-secret-9" not in text_of(provider)


def test_a_literal_password_beside_a_reference_is_sealed_too() -> None:
    provider = sealed(a_provider("eu", proxy_url="http://user:pw-secret-9@${PROXY_HOST}:3128"))
    assert "pw-secret-9" not in text_of(provider)


REFERENCES = {
    "token": "${EU_KEY}",
    "headers": {"Authorization": "Bearer ${EU_KEY}", "X-Api-Key": "${file:/run/secrets/eu}"},
    "query": {"key": "${EU_KEY}"},
    "proxy_url": "http://${PROXY_LOGIN}@127.0.0.1:3128",
    "oauth_detail": OAuthDetail(access_token="${file:/run/secrets/at}"),
}


@pytest.mark.parametrize("sealer", [None, Sealer(KEY)], ids=["without a key", "with a key"])
def test_references_are_kept_as_they_are(sealer: Sealer | None) -> None:
    configuration = of(a_provider("eu", **REFERENCES), a_provider("none", no_key_required=True))
    assert seal_configuration(configuration, sealer) == configuration


def test_what_is_sealed_already_is_kept_as_it_is() -> None:
    once = seal_configuration(of(a_secretive_provider()), Sealer(KEY))
    assert seal_configuration(once, Sealer(KEY)) == once
    assert seal_configuration(once, None) == once


def test_a_literal_that_stands_sealed_keeps_its_form() -> None:
    once = seal_configuration(of(a_secretive_provider()), Sealer(KEY))
    assert seal_configuration(of(a_secretive_provider()), Sealer(KEY), previous=once) == once


def test_a_literal_that_stands_sealed_with_another_key_is_sealed_anew() -> None:
    previous = seal_configuration(of(a_secretive_provider()), Sealer(OTHER_KEY))
    provider = seal_configuration(of(a_secretive_provider()), Sealer(KEY), previous=previous).providers[0]
    assert Credentials(Sealer(KEY)).access_token(provider) == SECRETS["token"]


def test_a_sealed_value_is_not_taken_over_from_another_provider() -> None:
    previous = seal_configuration(of(a_provider("eu", token="sk-same")), Sealer(KEY))
    provider = seal_configuration(of(a_provider("us", token="sk-same")), Sealer(KEY), previous=previous).providers[0]
    assert Credentials(Sealer(KEY)).access_token(provider) == "sk-same"


def test_without_a_key_literals_are_refused_with_every_place_named_and_no_value_shown() -> None:
    with pytest.raises(ConfigurationError) as caught:
        seal_configuration(of(a_secretive_provider(), a_provider("us", token="sk-us-9")), None)
    places = [fault.partition(":")[0] for fault in caught.value.faults]
    assert sorted(places) == sorted(
        [
            "providers[eu].token",
            "providers[eu].oauth_detail.access_token",
            "providers[eu].oauth_detail.refresh_token",
            "providers[eu].headers.Authorization",
            "providers[eu].headers.X-Api-Key",
            "providers[eu].headers.Cookie",
            "providers[eu].query.key",
            "providers[eu].proxy_url",
            "providers[us].token",
        ]
    )
    assert "BALANCER_SECRET_KEY" in caught.value.message
    assert not [secret for secret in (*SECRETS.values(), "sk-us-9") if secret in str(caught.value)]


# -- resolving ---------------------------------------------------------------------------------------------------------


def test_references_are_resolved_in_the_worker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EU_KEY", "sk-env")
    monkeypatch.setenv("PROXY_LOGIN", "me:pw")
    (tmp_path / "at").write_text("at-file\n")
    detail = OAuthDetail(access_token=f"${{file:{tmp_path / 'at'}}}")
    provider = a_provider("eu", **(REFERENCES | {"oauth_detail": detail, "headers": {"X-Region": "eu"}}))
    credentials = Credentials(None)
    assert credentials.access_token(provider) == "sk-env"
    assert credentials.query(provider) == {"key": "sk-env"}
    assert credentials.headers(provider) == {"X-Region": "eu"}
    assert credentials.proxy_url(provider) == "http://me:pw@127.0.0.1:3128"
    assert credentials.access_token(msgspec.structs.replace(provider, auth_type="oauth")) == "at-file"


def test_references_stand_within_other_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A", "one")
    monkeypatch.setenv("B", "two")
    provider = a_provider("eu", headers={"X-Auth": "first ${A} then ${B}"})
    assert Credentials(None).headers(provider) == {"X-Auth": "first one then two"}


def test_what_a_variable_holds_is_not_read_as_a_reference_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A", "${B}")
    monkeypatch.setenv("B", "never")
    assert Credentials(None).access_token(a_provider("eu", token="${A}")) == "${B}"


def test_a_file_is_read_again_when_it_changed(tmp_path: Path) -> None:
    path = tmp_path / "token"
    seconds = iter([0.0, 0.9, 1.0])
    credentials = Credentials(None, lambda: next(seconds))
    provider = a_provider("eu", token=f"${{file:{path}}}")
    path.write_text("one")
    assert credentials.access_token(provider) == "one"
    path.write_text("two")
    os.utime(path, ns=(1, 1))
    assert credentials.access_token(provider) == "one", "it is looked at once a second"
    assert credentials.access_token(provider) == "two"


def test_a_file_that_is_swapped_by_its_link_is_read_again(tmp_path: Path) -> None:
    """How mounted secrets are renewed: the name is a link, and the link moves."""
    for i, name in enumerate(("one", "two"), start=1):
        (tmp_path / name).write_text(name)
        os.utime(tmp_path / name, ns=(i, i))
    link = tmp_path / "token"
    seconds = iter([0.0, 1.0])
    credentials = Credentials(None, lambda: next(seconds))
    provider = a_provider("eu", token=f"${{file:{link}}}")
    link.symlink_to(tmp_path / "one")
    assert credentials.access_token(provider) == "one"
    link.unlink()
    link.symlink_to(tmp_path / "two")
    assert credentials.access_token(provider) == "two"


def test_a_mounted_secret_that_kubernetes_renews_is_read_again(tmp_path: Path) -> None:
    """The kubelet swaps `..data`, a link to a folder; old and new may have the same size, and times of one tick."""
    for name, text in (("..2026_1", "one"), ("..2026_2", "two")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "token").write_text(text)
        os.utime(tmp_path / name / "token", ns=(7, 7))
    data, link = tmp_path / "..data", tmp_path / "token"
    data.symlink_to("..2026_1")
    link.symlink_to("..data/token")
    seconds = iter([0.0, 1.0])
    credentials = Credentials(None, lambda: next(seconds))
    provider = a_provider("eu", token=f"${{file:{link}}}")
    assert credentials.access_token(provider) == "one"
    (tmp_path / "..data_tmp").symlink_to("..2026_2")
    (tmp_path / "..data_tmp").rename(data)
    assert credentials.access_token(provider) == "two"


def test_a_variable_that_is_not_set_is_named_with_the_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EU_KEY", raising=False)
    with pytest.raises(ConfigurationError, match=r"providers\[eu\]\.token: the variable EU_KEY is not set"):
        Credentials(None).access_token(a_provider("eu", token="${EU_KEY}"))


def test_a_file_that_is_not_there_is_named_with_the_place(tmp_path: Path) -> None:
    path = tmp_path / "none"
    with pytest.raises(ConfigurationError, match=r"providers\[eu\]\.headers\.X-Api-Key: cannot read .*none"):
        Credentials(None).headers(a_provider("eu", headers={"X-Api-Key": f"${{file:{path}}}"}))


def test_a_file_that_is_no_text_is_named_with_the_place(tmp_path: Path) -> None:
    path = tmp_path / "binary"
    path.write_bytes(b"\xff\xfe\x00sk")
    with pytest.raises(ConfigurationError, match=r"providers\[eu\]\.token: .*binary"):
        Credentials(None).access_token(a_provider("eu", token=f"${{file:{path}}}"))


def test_a_worker_without_the_key_names_the_place_of_what_is_sealed() -> None:
    with pytest.raises(ConfigurationError, match=r"providers\[eu\]\.token is sealed, .*no BALANCER_SECRET_KEY"):
        Credentials(None).access_token(sealed(a_secretive_provider()))


def test_a_provider_without_a_credential_has_an_empty_one() -> None:
    credentials = Credentials(None)
    assert credentials.access_token(a_provider("eu")) == ""
    assert credentials.access_token(a_provider("eu", auth_type="oauth")) == ""
    assert credentials.proxy_url(a_provider("eu")) == ""


# -- nothing in the clear ----------------------------------------------------------------------------------------------


def test_no_repr_shows_a_key_or_what_was_resolved(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("sk-file")
    sealer = Sealer(KEY)
    credentials = Credentials(sealer)
    credentials.access_token(a_provider("eu", token=f"${{file:{tmp_path / 'token'}}}"))
    credentials.access_token(sealed(a_secretive_provider()))
    shown = f"{sealer!r} {sealer} {credentials!r} {credentials}"
    assert not [text for text in (KEY, "k" * 32, "sk-file", SECRETS["token"]) if text in shown]


async def test_no_value_in_redis_holds_a_literal_credential(url: str, control: Any) -> None:
    """After a life of publications, picks and settles, recorded; every key is read in full."""
    settings = load({"record_events": 1000, "redis_deadline_ms": 5000}, {})
    balance = Balance(url, settings)
    providers = (a_secretive_provider(), a_provider("a", token="sk-other-9"))
    secrets = (*SECRETS.values(), "sk-other-9", "sk-token-changed", KEY)
    for token in ("sk-token-1", "sk-token-changed"):
        configuration = a_configuration(
            a_rule(services=("eu:m", "a:m")),
            providers=(msgspec.structs.replace(providers[0], token=token), providers[1]),
        )
        assert (await publish_file(balance.registry, configuration, Sealer(KEY))).result == "published"
    await balance.start()
    for _ in range(3):
        pick, _ = await balance.select(balance.directory.by_uuid["chat"], reserved=5, deadline_ms=60_000)
        balance.settle(pick, Outcome.SUCCESS, Usage(input=3))
        await balance.settled(pick)
    await balance.close()
    values = await everything(control)
    assert len(values) >= 8
    assert any("sealed:v2:" in text for text in values)
    for text in values:
        assert not [secret for secret in secrets if secret in text]


async def everything(control: Any) -> list[str]:
    """Every key with its whole value, as text."""
    texts = []
    async for key in control.scan_iter("*"):
        match await control.type(key):
            case b"string":
                value = await control.get(key)
            case b"hash":
                value = await control.hgetall(key)
            case b"zset":
                value = await control.zrange(key, 0, -1, withscores=True)
            case b"stream":
                value = await control.xrange(key)
            case other:
                raise AssertionError(f"{key!r} is a {other!r}")
        texts.append(f"{key!r} {value!r}")
    return texts


def test_differences_show_no_credential() -> None:
    old, new = a_secretive_provider(), a_secretive_provider(token="sk-token-new", headers={}, proxy_url="")
    lines = document.diff(of(old), of(new)) + document.diff(of(new), of(old))
    assert any("token changed" in line for line in lines)
    assert not [secret for secret in (*SECRETS.values(), "sk-token-new") if secret in "\n".join(lines)]
