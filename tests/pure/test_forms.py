"""Reading and editing multipart/form-data bodies."""

from __future__ import annotations

import pytest

from balancer.bodies import peek_form, replace_form_model
from balancer.errors import RequestError

TYPE = "multipart/form-data; boundary=xyz"
AUDIO = (
    b'Content-Disposition: form-data; name="file"; filename="a.mp3"\r\nContent-Type: audio/mpeg\r\n\r\n'
    b'\x00\xff"model"\r\n'
)
MODEL = b'Content-Disposition: form-data; name="model"\r\n\r\nold'


def form(*parts: bytes, boundary: bytes = b"xyz", front: bytes = b"") -> bytes:
    """A form of these parts, each with its header."""
    opened = b"".join(b"--%b\r\n%b\r\n" % (boundary, part) for part in parts)
    return b"%b%b--%b--\r\n" % (front, opened, boundary)


@pytest.mark.parametrize("parts", [(MODEL, AUDIO), (AUDIO, MODEL), (MODEL,)])
@pytest.mark.parametrize("front", [b"", b"preamble\r\n"])
def test_only_the_content_of_the_model_part_changes(parts: tuple[bytes, ...], front: bytes) -> None:
    body = form(*parts, front=front)

    assert peek_form(body, TYPE).model == "old"
    assert replace_form_model(body, TYPE, "new-é") == body.replace(b"\r\n\r\nold\r\n", "\r\n\r\nnew-é\r\n".encode())


@pytest.mark.parametrize(
    "content_type",
    [
        "multipart/form-data; boundary=xyz",
        'multipart/form-data; boundary="xyz"',
        "Multipart/Form-Data;charset=utf-8;Boundary=xyz; x=y",
    ],
)
def test_the_boundary_may_be_quoted_and_stand_anywhere(content_type: str) -> None:
    assert peek_form(form(MODEL), content_type).model == "old"


@pytest.mark.parametrize(
    "header",
    [
        b"content-disposition: FORM-DATA; name=model",
        b'Content-Disposition:form-data ; NAME = "model"',
        b'Content-Type: text/plain\r\nContent-Disposition: form-data; filename="x"; name="model"',
    ],
)
def test_a_part_is_named_in_any_spelling(header: bytes) -> None:
    assert peek_form(form(AUDIO, header + b"\r\n\r\nold"), TYPE).model == "old"


@pytest.mark.parametrize(
    "part",
    [
        b'Content-Disposition: form-data; name="file"; filename="a; name=model"\r\n\r\nno',
        b'Content-Disposition: form-data; name="file"; filename="a\\"; name=\\"model"\r\n\r\nno',
        b'Content-Disposition: form-data; filename="model"\r\n\r\nno',
        b'Content-Disposition: form-data; name="models"\r\n\r\nno',
        b'Content-Type: text/plain; name="model"\r\n\r\nno',
        b'\r\nContent-Disposition: form-data; name="model"',
    ],
)
def test_what_only_looks_like_the_model_is_passed_over(part: bytes) -> None:
    """A file's name was once searched for the part's."""
    body = form(part, MODEL)

    assert peek_form(body, TYPE).model == "old"
    assert replace_form_model(body, TYPE, "new") == form(part, MODEL.replace(b"old", b"new"))


@pytest.mark.parametrize(("said", "asks"), [(b"true", True), (b"True", True), (b"false", False), (b"", False)])
def test_a_form_may_ask_for_a_stream(said: bytes, asks: bool) -> None:
    stream = b'Content-Disposition: form-data; name="stream"\r\n\r\n' + said

    assert bool(peek_form(form(MODEL, stream), TYPE).stream) is asks
    assert not peek_form(form(MODEL), TYPE).stream


@pytest.mark.parametrize(
    ("body", "content_type", "words"),
    [
        (form(AUDIO), TYPE, "no `model`"),
        (form(MODEL.replace(b"old", b"")), TYPE, "no `model`"),
        (form(MODEL.replace(b"\r\nold", b"")), TYPE, "no `model`"),
        (form(MODEL.replace(b"old", b" ")), TYPE, "no `model`"),
        (form(MODEL, MODEL), TYPE, "more than one `model`"),
        (form(MODEL), "multipart/form-data", "no boundary"),
        (form(MODEL), "multipart/form-data; boundary=abc", "no `model`"),
        (form(MODEL)[: -len(b"--xyz--\r\n") - 2], TYPE, "no `model`"),
        (b"", TYPE, "no `model`"),
        (b"--xyz", TYPE, "no `model`"),
        (b"--xyz--\r\n", TYPE, "no `model`"),
    ],
)
def test_a_form_without_one_model_is_refused(body: bytes, content_type: str, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        peek_form(body, content_type)
