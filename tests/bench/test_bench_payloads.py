"""The webhook bodies that the benchmarks send: size, signature, ids, senders."""

import hashlib
import hmac
import json

import pytest

from bench.payloads import BODY_SIZE, DEFAULT_TEXTS, Population, request_bytes


def test_every_body_has_exactly_the_stated_size():
    bodies = Population().bodies(3_000)
    assert {len(body) for body in bodies} == {BODY_SIZE} == {600}


def test_body_is_a_text_message_as_meta_sends_it():
    population = Population(senders=10, texts=("taxi", 'a "quoted" é'))
    for index, body in enumerate(population.bodies(20)):
        value = json.loads(body)["entry"][0]["changes"][0]["value"]
        (message,) = value["messages"]
        (contact,) = value["contacts"]
        assert message["text"]["body"] == population.text_of(index % 10)
        assert message["from"] == contact["wa_id"] == f"250788{index % 10:06d}"
        assert message["id"] == population.wamid(index)
        assert value["metadata"]["phone_number_id"] == population.phone_number_id


def test_ids_are_unique_within_and_between_runs():
    first, second = Population(), Population()
    ids = {p.wamid(i) for p in (first, second) for i in range(2_000)}
    assert len(ids) == 4_000
    assert first.bodies(2, first=5)[0] == first.bodies(6)[5]


def test_a_thousand_senders_each_keep_their_text():
    said: dict[str, set[str]] = {}
    for body in Population().bodies(2_500):
        message = json.loads(body)["entry"][0]["changes"][0]["value"]["messages"][0]
        said.setdefault(message["from"], set()).add(message["text"]["body"])
    assert len(said) == 1_000
    assert {len(texts) for texts in said.values()} == {1}
    assert set().union(*said.values()) == set(DEFAULT_TEXTS)


def test_a_text_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="does not fit"):
        Population(texts=("x" * 600,)).bodies(1)


def test_request_carries_a_signature_that_verifies():
    body = Population().bodies(1)[0]
    request = request_bytes(body, "secret", "127.0.0.1:8080")
    head, _, sent = request.partition(b"\r\n\r\n")
    headers = dict(line.split(": ", 1) for line in head.decode().split("\r\n")[1:])
    expected = hmac.new(b"secret", sent, hashlib.sha256).hexdigest()
    assert sent == body
    assert headers["X-Hub-Signature-256"] == f"sha256={expected}"
    assert headers["Content-Length"] == "600"
