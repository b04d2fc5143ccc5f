"""Which addresses are reached: by what a name resolves to when a connection is made, however written."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from tables import each

from router.delivery.connection import HttpConnection, NoAnswer, Origin
from router.delivery.guard import refusal

REQUEST = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"

NEVER = [
    "169.254.169.254", "169.254.170.2", "169.254.0.1", "fe80::1", "fe80::a9fe:a9fe", "fe80::1%eth0",
    "fd00:ec2::254", "fd20:ce::254", "100.100.100.200", "192.0.0.192", "::ffff:169.254.169.254",
    "::ffff:a9fe:a9fe", "64:ff9b::169.254.169.254", "64:ff9b:1::a9fe:a9fe", "2002:a9fe:a9fe::",
    "::169.254.169.254", "0.0.0.0", "::", "224.0.0.1", "ff02::1", "255.255.255.255", "::ffff:0.0.0.0",
    "2001:0:a9fe:a9fe::", "nonsense", "",
]  # fmt: skip
PRIVATE = [
    "127.0.0.1", "127.8.8.8", "::1", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1", "100.64.0.1",
    "fc00::1", "fd12:3456::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::10.0.0.1", "2002:0a00:0001::",
    "::127.0.0.1", "192.0.2.1", "198.18.0.1", "240.0.0.1", "2001:db8::1",
]  # fmt: skip
PUBLIC = ["8.8.8.8", "172.32.0.1", "192.169.0.1", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::8.8.8.8"]


@each("address", NEVER)
def test_these_are_reached_by_nobody(address: str) -> None:
    assert refusal(address, allow_private=True) is not None
    assert refusal(address, allow_private=False) is not None


@each("address", PRIVATE)
def test_these_only_where_it_is_allowed(address: str) -> None:
    assert refusal(address, allow_private=False) is not None
    assert refusal(address, allow_private=True) is None


@each("address", PUBLIC)
def test_these_by_everybody(address: str) -> None:
    assert refusal(address, allow_private=False) is None
    assert refusal(address, allow_private=True) is None


@given(st.ip_addresses(v=4), st.booleans())
def test_an_address_means_the_same_however_it_is_written(address: Any, allow_private: bool) -> None:
    plainly = refusal(str(address), allow_private=allow_private) is None
    for written in (f"::ffff:{address}", f"64:ff9b::{address}"):
        assert (refusal(written, allow_private=allow_private) is None) == plainly


class Names(trio.abc.HostnameResolver):
    """A name server that answers what it is told to, a new answer each time."""

    def __init__(self, *answers: list[str]) -> None:
        self.answers = list(answers)
        self.asked = 0

    async def getaddrinfo(
        self, host: Any, port: Any, family: int = 0, type: int = 0, proto: int = 0, flags: int = 0
    ) -> Any:
        addresses = self.answers[min(self.asked, len(self.answers) - 1)]
        self.asked += 1
        return [
            (socket.AF_INET6 if ":" in one else socket.AF_INET, type, 6, "", (one, port)) for one in addresses
        ]

    async def getnameinfo(self, sockaddr: Any, flags: int) -> Any:
        raise NotImplementedError


@asynccontextmanager
async def listening(answer: bytes, seen: list[bytes]) -> AsyncIterator[int]:
    async def handle(stream: trio.SocketStream) -> None:
        while data := await stream.receive_some(4_096):
            seen.append(data)
            await stream.send_all(answer)

    async with trio.open_nursery() as nursery:
        [listener] = await nursery.start(partial(trio.serve_tcp, handle, 0, host="127.0.0.1"))
        yield listener.socket.getsockname()[1]
        nursery.cancel_scope.cancel()


OK = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"


async def exchanged(
    names: Names, *, allow_private: bool, answer: bytes = OK
) -> tuple[int | str, list[bytes]]:
    """The status of one exchange with `service.test`, or why there was none, and what came to a listener on
    127.0.0.1."""
    seen: list[bytes] = []
    trio.socket.set_custom_hostname_resolver(names)
    async with listening(answer, seen) as port:
        connection = HttpConnection(Origin.of(f"http://service.test:{port}/"), allow_private=allow_private)
        try:
            return (await connection.exchange(REQUEST)).status, seen
        except NoAnswer as error:
            return str(error), seen
        finally:
            await connection.close()


async def test_an_allowed_private_service_works() -> None:
    assert await exchanged(Names(["127.0.0.1"]), allow_private=True) == (200, [REQUEST])


@each(
    ("answer", "allow_private"),
    [
        (["127.0.0.1"], False),
        (["::1"], False),
        (["::ffff:127.0.0.1"], False),
        (["10.1.2.3", "192.168.0.1"], False),
        (["169.254.169.254"], True),
        (["::ffff:169.254.169.254"], True),
        (["0.0.0.0"], True),
        ([], True),
    ],
)
async def test_what_a_name_resolves_to_is_looked_at(answer: list[str], allow_private: bool) -> None:
    said, seen = await exchanged(Names(answer), allow_private=allow_private)
    assert "may not be reached" in str(said)
    assert seen == []


async def test_of_several_addresses_those_that_are_allowed_are_tried() -> None:
    names = Names(["169.254.169.254", "::ffff:a9fe:a9fe", "127.0.0.1"])
    assert (await exchanged(names, allow_private=True))[0] == 200


async def test_a_name_is_asked_for_once_so_that_a_second_answer_changes_nothing() -> None:
    names = Names(["127.0.0.1"], ["169.254.169.254"])
    assert (await exchanged(names, allow_private=True))[0] == 200
    assert names.asked == 1


async def test_a_connection_that_is_made_anew_is_looked_at_again() -> None:
    names = Names(["127.0.0.1"], ["169.254.169.254"])
    trio.socket.set_custom_hostname_resolver(names)
    seen: list[bytes] = []
    async with listening(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n", seen) as port:
        connection = HttpConnection(Origin.of(f"http://service.test:{port}/"))
        assert (await connection.exchange(REQUEST)).status == 200
        with pytest.raises(NoAnswer, match="may not be reached"):
            await connection.exchange(REQUEST)
    assert seen == [REQUEST]


async def test_a_name_that_resolves_to_something_else_is_followed_when_the_connection_is_old() -> None:
    for max_age, asked in ((60.0, 1), (0.0, 3)):
        names = Names(["127.0.0.1"])
        trio.socket.set_custom_hostname_resolver(names)
        async with listening(OK, []) as port:
            connection = HttpConnection(Origin.of(f"http://service.test:{port}/"), max_age=max_age)
            for _ in range(3):
                assert (await connection.exchange(REQUEST)).status == 200
            assert names.asked == asked
            await connection.close()


async def test_a_redirect_is_not_followed() -> None:
    answer = b"HTTP/1.1 302 Found\r\nLocation: http://169.254.169.254/\r\nContent-Length: 0\r\n\r\n"
    assert await exchanged(Names(["127.0.0.1"]), allow_private=True, answer=answer) == (302, [REQUEST])
