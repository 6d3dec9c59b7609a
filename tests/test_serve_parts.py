"""Parts of the server that need no model: held text, pictures of the web, requests, the decoding thread."""

import asyncio
import http.server
import math
import queue
import socket
import threading
import time
from io import BytesIO
from types import SimpleNamespace

import pytest
import torch
from openai.types.chat import ChatCompletionMessage
from PIL import Image

from vispec.model.rows import Round
from vispec.serve import pictures
from vispec.serve.engine import Ask, Engine, Stopping
from vispec.serve.guard import Guard, HttpLimits
from vispec.serve.logprobs import TokenLogprobs
from vispec.serve.metrics import Metrics
from vispec.serve.pictures import PictureLimits, picture_of, public_address
from vispec.serve.protocol import ApiError, parse_request
from vispec.serve.text import StoppedText, TokenTexts


class Letters:
    """A tokenizer whose tokens are letters."""

    def decode(self, ids, **options) -> str:
        return "".join(map(chr, ids))


@pytest.mark.parametrize(
    ("text", "stops"),
    [
        ("abcabd", ["abd"]),
        ("aab", ["ab"]),
        ("abc", []),
        ("xyz", ["q"]),
    ],
)
def test_text_is_held_back_while_a_stop_string_may_form(text, stops):
    stopped = StoppedText(Letters(), stops)
    found = []
    for letter in text:
        found.append("".join(piece for piece, _ in stopped.push(ord(letter), False)))
        if stopped.stopped:
            break
    said = "".join(found) + "".join(piece for piece, _ in stopped.finish())
    ends = [text.find(stop) for stop in stops if stop in text]
    assert said == text[: min(ends, default=len(text))]
    for place in range(len(found)):  # nothing is told of what turned out to be a stop string
        assert said.startswith("".join(found[: place + 1]))


def test_what_was_held_for_nothing_is_told_at_the_end():
    stopped = StoppedText(Letters(), ["abc"])
    assert [piece for letter in "xab" for piece in stopped.push(ord(letter), True)] == [("x", True)]
    assert stopped.finish() == [("a", True), ("b", True)]


class Words:
    """A tokenizer of Llama's kind: what it decodes loses a first space."""

    WORDS = "0", " tree", "\ufffd", "</s>"

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return [self.WORDS.index(text)]

    def decode(self, ids) -> str:
        return "".join(self.WORDS[token] for token in ids).removeprefix(" ")


def test_logprobs_have_the_texts_of_tokens_behind_others():
    logits = torch.tensor([math.log(0.5), math.log(0.3), math.log(0.2), -math.inf])
    told = TokenLogprobs(TokenTexts(Words()), 4, frozenset({3})).of([1, 2, 3], [logits] * 3)
    assert [(one["token"], one["bytes"]) for one in told] == [(" tree", list(b" tree")), ("\ufffd", None)]
    assert [math.exp(one["logprob"]) for one in told] == pytest.approx([0.3, 0.2])
    assert [(one["token"], one["logprob"]) for one in told[0]["top_logprobs"]] == [
        ("0", pytest.approx(math.log(0.5))),
        (" tree", told[0]["logprob"]),
        ("\ufffd", told[1]["logprob"]),
        ("</s>", -9999.0),
    ]


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/picture":
            file = BytesIO()
            Image.new("RGB", (4, 5)).save(file, "PNG")
            self.send_response(200)
            self.end_headers()
            self.wfile.write(file.getvalue())
            return
        self.send_response(302)
        self.send_header(
            "Location", {"/near": "/picture", "/far": "http://other.test/picture"}.get(self.path, self.path)
        )
        self.end_headers()

    def log_message(self, *args):
        """Nothing."""


@pytest.fixture
def web(monkeypatch):
    """The URL of a server whose host counts as a public one."""
    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    monkeypatch.setattr(pictures, "public_address", lambda host, port: "127.0.0.1")
    yield f"http://pictures.test:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


LIMITS = PictureLimits(pixels=100, images=1, hosts=frozenset({"pictures.test"}))


@pytest.mark.parametrize("path", ["/picture", "/near"])
def test_pictures_of_hosts_that_are_allowed(web, path):
    assert picture_of(web + path, LIMITS, "x")().size == (4, 5)


@pytest.mark.parametrize(
    ("path", "reason"), [("/far", "other.test are not fetched"), ("/loop", "more than 3 redirects")]
)
def test_redirects_are_held_to_the_same_rules(web, path, reason):
    with pytest.raises(ApiError, match=reason):
        picture_of(web + path, LIMITS, "x")


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.1.2.3",
        "169.254.169.254",
        "::1",
        "::ffff:127.0.0.1",
        "64:ff9b::a00:1",
        "fd00::1",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
    ],
)
def test_addresses_that_are_not_public(monkeypatch, address):
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    found = [(family, socket.SOCK_STREAM, 0, "", (known, 80)) for known in ("93.184.216.34", address)]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: found)
    with pytest.raises(OSError, match="not public"):
        public_address("pictures.test", 80)


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ({"type": "text", "txt": "a"}, "messages.0.content.0.text"),
        ({"type": "image_url", "image_url": {"uri": "a"}}, "messages.0.content.0.image_url.url"),
        ({"type": "input_audio"}, "messages.0.content.0"),
    ],
)
def test_the_part_that_is_wrong_is_named(part, name):
    with pytest.raises(ApiError) as refused:
        parse_request({"model": "m", "messages": [{"role": "user", "content": [part]}]})
    assert refused.value.param == name


@pytest.mark.parametrize(
    "given",
    [
        {"frequency_penalty": 0, "logit_bias": None, "tools": None, "tool_choice": "none", "unknown": None},
        {"tool_choice": "auto", "tools": [], "parallel_tool_calls": True, "logit_bias": {}, "stop": []},
        {"modalities": ["text"], "response_format": {"type": "text"}, "stream_options": None, "top_p": 0},
        {"logprobs": False, "top_logprobs": 0, "speculate": None, "prompt_cache_retention": "24h"},
    ],
)
def test_what_asks_for_nothing_is_taken(given):
    parse_request({"model": "m", "messages": [{"role": "user", "content": "What?"}], **given})


def test_an_answer_may_be_sent_back_as_the_client_has_it():
    answer = ChatCompletionMessage(role="assistant", content="A tree.", annotations=[]).model_dump()
    asked = {"role": "user", "content": "What?"}
    assert parse_request({"model": "m", "messages": [asked, answer, asked]}).messages[1].content == "A tree."


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": "What?"}] * 3000,
        [{"role": "user", "content": [{"type": "text", "text": "What?"}] * 3000}],
    ],
)
def test_crowds_of_messages_are_refused(messages):
    with pytest.raises(ApiError, match="3,000|3,001"):
        parse_request({"model": "m", "messages": messages})


class Rows(dict):
    """A batch of answers of three letters."""

    full = False

    def join(self, joining) -> tuple[int, Round]:
        number = joining.length
        self[number] = 1
        return number, Round([ord("a")], 0, 0, ended=False)

    def round(self) -> dict[int, Round]:
        self.update({number: length + 1 for number, length in self.items()})
        step = {number: Round([ord("a")], 0, 0, ended=length == 3) for number, length in self.items()}
        for number in [number for number, one in step.items() if one.ended]:
            self.leave(number)
        return step

    def leave(self, number: int) -> None:
        del self[number]

    def close(self) -> None:
        """Nothing."""


def asking(number: int, text: StoppedText | None) -> tuple[Ask, queue.Queue]:
    told = queue.Queue()
    joining = SimpleNamespace(length=number, stop=SimpleNamespace(eos_token_ids=()))
    return Ask(joining, text, told.put, deadline=math.inf), told


def test_prompts_join_in_their_order_and_few_at_a_time():
    class Watched(Rows):
        def __init__(self):
            super().__init__()
            self.joined, self.all_wait = [[]], threading.Event()

        def join(self, joining):
            self.joined[-1].append(joining.length)
            return super().join(joining)

        def round(self):
            assert self.all_wait.wait(10)
            self.joined.append([])
            return super().round()

    batch = Watched()
    engine = Engine({True: batch}, 8, Metrics())
    engine.start()
    asks = [asking(length, StoppedText(Letters())) for length in (1, 1000, 1001, 1002, 3000, 10)]
    for ask, told in asks:
        engine.submit([ask])
        if ask is asks[0][0]:
            told.get(timeout=10)
    batch.all_wait.set()
    while asks[-1][1].get(timeout=10).finish is None:
        pass
    engine.stop()
    assert batch.joined[:5] == [[1], [1000, 1001], [1002], [3000], [10]]


def test_decoding_keeps_its_cores_when_other_threads_take_one_each():
    class Counted(Rows):
        def round(self):
            self.cores = torch.get_num_threads()
            return super().round()

    batch, before = Counted(), torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        engine = Engine({True: batch}, 4, Metrics())
        engine.start()
        torch.set_num_threads(1)
        ask, told = asking(1, StoppedText(Letters()))
        engine.submit([ask])
        while told.get(timeout=10).finish is None:
            pass
        engine.stop()
    finally:
        torch.set_num_threads(before)
    assert batch.cores == 3


def test_answers_that_are_not_there_in_time_end_with_an_error():
    class Endless(Rows):
        @property
        def full(self):
            return len(self) > 0

        def round(self):
            time.sleep(0.01)
            return {number: Round([ord("a")], 0, 0, ended=False) for number in self}

    batch = Endless()
    engine = Engine({True: batch}, 4, Metrics())
    engine.start()
    late = [asking(number, StoppedText(Letters())) for number in (1, 2)]  # for one row
    for ask, _ in late:
        ask.deadline = time.monotonic() + 0.2
    patient, its = asking(3, StoppedText(Letters()))
    engine.submit([*(ask for ask, _ in late), patient])
    for _, told in late:
        while (one := told.get(timeout=10)).error is None:
            pass
        assert one.error.status == 504
    assert its.get(timeout=10).error is None and list(batch) == [3]
    engine.stop()


def test_an_answer_that_cannot_be_told_ends_alone():
    engine = Engine({True: Rows()}, 4, Metrics())
    (broken, its), (sound, own) = asking(1, None), asking(2, StoppedText(Letters()))
    engine.start()
    engine.submit([broken, sound])
    assert its.get(timeout=10).error.status == 500
    assert [own.get(timeout=10).finish for _ in range(3)] == [None, None, "length"]
    engine.stop()


def test_those_who_wait_hear_of_it_when_decoding_breaks_down(monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda error: None)

    class Broken(Rows):
        def round(self):
            raise SystemExit

    engine = Engine({True: Broken()}, 4, Metrics())
    (running, its), (waiting, own) = asking(1, StoppedText(Letters())), asking(3000, StoppedText(Letters()))
    engine.start()
    engine.submit([running, waiting])
    assert its.get(timeout=10).pieces
    assert its.get(timeout=10).error.status == own.get(timeout=10).error.status == 503
    engine.stop()
    assert not engine.alive
    with pytest.raises(Stopping):
        engine.submit([waiting])


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "the body was not there after 0.01 seconds"),
        ([{"body": b"1234", "more_body": True}], "the body was not there after 0.01 seconds"),
        ([{"body": b"1234", "more_body": True}, {"body": b"5678"}], "more than 6 bytes"),
    ],
)
def test_bodies_are_held_to_time_and_size(messages, reason):
    async def app(scope, receive, send):
        while (await receive()).get("more_body"):
            pass

    async def receive():
        return messages.pop(0) if messages else await asyncio.sleep(10)

    scope = {"type": "http", "method": "POST", "path": "/", "headers": []}
    with pytest.raises(ApiError, match=reason):
        asyncio.run(Guard(app, HttpLimits(6, 0.01), Metrics())(scope, receive, None))
