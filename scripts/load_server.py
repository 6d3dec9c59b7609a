"""How the server bears load: its speed with and without the draft, or whether mixed and broken requests come out right.

    python scripts/load_server.py                     # 1, 4 and 16 clients, a minute each; the embedded pair
    python scripts/load_server.py -- --base-model-path DIR --spec-model-path DIR --max-batch 16
    python scripts/load_server.py --url http://127.0.0.1:8000
    python scripts/load_server.py --mixed 1000

What stands behind `--` are flags of `vispec.serve`. Two servers are started, one of them with `--plain`, and measured
in turn, each while the other idles; `--url` measures one that is there. Each client streams greedy answers, half of
them about pictures, one after the other; both servers get the same questions. The window opens when each client has had
one answer. What ends within it counts as a whole: those that have begun before stand for those that are not there yet
when it closes. Tokens are those of `usage`. Times begin when a client asks first, so waiting for a full queue (429) is
part of them.

`--mixed N` sends N requests of all shapes, a tenth of them broken or left by their client, after a fifth as many that
warm up. Every answer has to be that of `SpecModel.generate` alone in float32, what is broken has to be refused for its
reason, the log may have no traceback, and the server's memory has to stay within 5 %. Each fault is a line, and with
any the exit code is 1.
"""

import asyncio
import json
import os
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from subprocess import Popen

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import httpx
import numpy as np
from load_client import LONGEST_SECONDS, Reply, ask
from load_mixed import SERVER_FLAGS, Alone, Case, faults, make_cases, simple_question
from tqdm import tqdm

from vispec.children import start_child
from vispec.cli import Parser, UserError, count, limit, run_cli, whole
from vispec.evaluation.flags import add_tree_flags
from vispec.evaluation.loading import load_model, quiet_transformers
from vispec.evaluation.pair_flags import add_pair_flags, asked_pair
from vispec.model.shape import TUNE
from vispec.prompts import load_processor
from vispec.serve.__main__ import API_KEY
from vispec.timing import in_turn, now

ROOT = Path(__file__).resolve().parent.parent
MIXED_CLIENTS = 12
WARM_UP_SHARE = 0.2
MEMORY_MAY_DIFFER = 0.05
START_SECONDS, IDLE_SECONDS = 600, 60
TITLES = (
    "clients", "server", "answers", "tokens/s", "x plain", "first token p50 / p99 s", "answer p50 / p99 s", "τ", "429s",
    "errors",
)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    with tempfile.TemporaryDirectory() as folder:
        found = mixed(args, Path(folder, "log")) if args.mixed else rates(args, Path(folder))
    return 1 if found else 0


def parse(argv: list[str] | None):
    parser = Parser(prog="scripts/load_server.py", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--clients", nargs="+", type=count, default=[1, 4, 16], help="that ask at a time (default: 1 4 16)")
    add("--seconds", type=limit, default=60.0, help="for each number of clients and server (default: %(default)g)")
    add("--max-new-tokens", type=count, default=128, help="of an answer (default: %(default)s)")
    add("--url", help=f"of a server that is there; {API_KEY} in the environment is its key")
    add("--mixed", type=count, metavar="N", help="check N requests instead of measuring")
    add("--seed", type=whole, default=0, help="of the requests (default: %(default)s)")
    add("server_flags", nargs="*", metavar="-- FLAGS", help="of vispec.serve")
    args = parser.parse_args(argv)
    if args.url and (args.mixed or args.server_flags):
        parser.error("--url: --mixed and flags of vispec.serve are for servers that are started here")
    return args


# --- servers ---


@dataclass(frozen=True)
class Server:
    """One that was started here."""

    url: str
    process: Popen
    log: Path

    def memory(self) -> int:
        """Resident, in KiB."""
        return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{self.process.pid}/status").read_text())[1])


@contextmanager
def started(flags: Sequence[str], log: Path) -> Iterator[Server]:
    """A server with these flags, which is told to end when the context does."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    process = start_child(["vispec.serve", "--port", "0", *flags], log, {"PYTHONPATH": path})
    try:
        yield Server(_url(process, log), process, log)
    finally:
        process.terminate()
        process.wait()


def _url(process: Popen, log: Path) -> str:
    deadline = now() + START_SECONDS
    while process.poll() is None and now() < deadline:
        if found := re.search(r"running on (http://\S+)", log.read_text()):
            return found[1]
        time.sleep(0.1)
    raise UserError(f"the server did not start: {' '.join(log.read_text().splitlines()[-1:])}")


def connected(url: str) -> httpx.AsyncClient:
    key = os.environ.get(API_KEY)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    unlimited = httpx.Limits(max_connections=None)
    return httpx.AsyncClient(base_url=url, headers=headers, timeout=LONGEST_SECONDS, limits=unlimited)


async def model_of(http: httpx.AsyncClient) -> str:
    answer = (await http.get("/v1/models")).raise_for_status()
    return answer.json()["data"][0]["id"]


# --- speed ---


@dataclass(frozen=True)
class Window:
    """What ended while a server was measured."""

    seconds: float
    replies: Sequence[Reply]

    @property
    def right(self) -> list[Reply]:
        return [reply for reply in self.replies if reply.whole and reply.usage]

    @property
    def wrong(self) -> list[str]:
        """What became of the others."""
        return [reply.error or "no usage" for reply in self.replies if not (reply.whole and reply.usage)]

    @property
    def speed(self) -> float:
        """Tokens/s."""
        return sum(reply.usage["completion_tokens"] for reply in self.right) / self.seconds

    @property
    def tau(self) -> float | None:
        """Accepted draft tokens a round; None where there was no draft."""
        rounds, accepted = (
            sum(reply.usage.get(name, 0) for reply in self.right) for name in ("rounds", "accepted_draft_tokens")
        )
        return accepted / rounds if rounds else None


def rates(args, folder: Path) -> list[str]:
    """Print the table, and what went wrong, which is returned."""
    with ExitStack() as stack:
        arms = {"draft": args.server_flags, "plain": [*args.server_flags, "--plain"]}
        urls = {"--url": args.url} if args.url else {
            arm: stack.enter_context(started(flags, folder / arm)).url for arm, flags in arms.items()
        }  # fmt: skip
        found = {}
        for place, clients in enumerate(args.clients):
            for arm in in_turn(list(urls), place):
                found[clients, arm] = asyncio.run(measure(urls[arm], clients, args))
        windows = {(clients, arm): found[clients, arm] for clients in args.clients for arm in urls}
    print(table(windows))
    wrong = Counter(reason for window in windows.values() for reason in window.wrong)
    lines = [f"{times} times: {reason}" for reason, times in wrong.items()]
    print("\n".join(lines), end="\n" if lines else "")
    return lines


async def measure(url: str, clients: int, args) -> Window:
    """Let so many clients ask; when it ends, none of their answers is being made any more."""
    closes, replies, begun = float("inf"), [], set()

    async def ask_on(number: int) -> None:
        turn = 0
        while now() < closes:
            rng = random.Random(f"{args.seed}/{number}/{turn}")
            body = simple_question(rng, model, (number + turn) % 2 == 0, args.max_new_tokens)
            replies.append(await ask(http, json.dumps(body).encode()))
            begun.add(number)
            turn += 1

    async with connected(url) as http:
        model = await model_of(http)
        asking = asyncio.gather(*map(ask_on, range(clients)))
        while len(begun) < clients and not asking.done():
            await asyncio.sleep(0.01)
        opens, closes = now(), now() + args.seconds
        await asking
    return Window(args.seconds, [reply for reply in replies if opens <= reply.ended_at < closes])


def table(windows: Mapping[tuple[int, str], Window]) -> str:
    lines = [f"| {' | '.join(TITLES)} |", "|---" * len(TITLES) + "|"]
    for (clients, arm), window in windows.items():
        plain, right = windows.get((clients, "plain")), window.right
        cells = [
            clients,
            arm,
            len(right),
            f"{window.speed:.1f}",
            f"{window.speed / plain.speed:.2f}" if plain and plain.speed else "-",
            percentiles([one.first_at - one.asked_at for one in right if one.first_at is not None]),
            percentiles([one.ended_at - one.asked_at for one in right]),
            "-" if window.tau is None else f"{window.tau:.2f}",
            sum(one.refused for one in window.replies),
            len(window.wrong),
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def percentiles(seconds: Sequence[float]) -> str:
    return " / ".join(f"{value:.3f}" for value in np.percentile(seconds, (50, 99))) if seconds else "-"


# --- mixed requests ---


def mixed(args, log: Path) -> list[str]:
    """Print and return what is wrong, a line each."""
    flags = [*args.server_flags, *SERVER_FLAGS, "--dtype", "float32"]
    with started(flags, log) as server:
        found = asyncio.run(check(server, args, reference(flags)))
    lines = log.read_text().splitlines()
    if tracebacks := sum("Traceback" in line for line in lines):
        print("\n".join(line for line in lines if " INFO " not in line))
        found.append(f"{tracebacks} tracebacks in the server's log; they stand above")
    print("\n".join([*found, f"{len(found)} faults"]))
    return found


def reference(flags: Sequence[str]) -> Alone:
    """The pair that the server's flags name."""
    parser = Parser()
    add_pair_flags(parser), add_tree_flags(parser, ""), parser.add_hardware()
    args, _ = parser.parse_known_args(flags)
    base, spec, tree, dtype = asked_pair(args)
    quiet_transformers()
    tree = None if tree == TUNE else tree
    model = load_model(base, spec, dtype=dtype, device_map=args.device_map, method=args.method, tree=tree)
    return Alone(model, load_processor(base))


async def check(server: Server, args, alone: Alone) -> list[str]:
    """What is wrong with the answers, and with the server's memory."""
    memory, cases, replies = [], [], []
    async with connected(server.url) as http:
        model = await model_of(http)
        for name, requests in (("warming up", int(WARM_UP_SHARE * args.mixed)), ("asking", args.mixed)):
            new = list(islice(make_cases(random.Random(f"{args.seed}/{name}"), model), requests))
            replies += await ask_all(http, new, name)
            cases += new
            await idle(http)
            memory.append(server.memory())
    before, after = memory
    kinds = Counter(one.kind for one in cases)
    print(f"{len(cases)} requests: {', '.join(f'{n} {kind}' for kind, n in kinds.most_common())}")
    print(f"{sum(one.refused for one in replies)} times the queue was full")
    print(f"server's memory: {before:,} KiB after the warm-up, {after:,} KiB at the end ({after / before - 1:+.1%})")
    found = [
        f"request {number}, {one.kind}: {fault}"
        for number, (one, reply) in enumerate(zip(tqdm(cases, "comparing"), replies, strict=True))
        for fault in faults(one, reply, alone)
    ]
    if abs(after / before - 1) > MEMORY_MAY_DIFFER:
        found.append(f"the server's memory went from {before:,} to {after:,} KiB")
    return found


async def ask_all(http: httpx.AsyncClient, cases: Sequence[Case], name: str) -> list[Reply]:
    """Ask by some clients at a time; in the order of the cases."""
    replies, waiting, bar = {}, iter(enumerate(cases)), tqdm(total=len(cases), desc=name)

    async def ask_on() -> None:
        for number, one in waiting:
            replies[number] = await ask(http, one.content, one.leaves, **one.options)
            bar.update()

    await asyncio.gather(*(ask_on() for _ in range(MIXED_CLIENTS)))
    bar.close()
    return [replies[number] for number in range(len(cases))]


async def idle(http: httpx.AsyncClient) -> None:
    """Wait until no answer waits or is being made; those whose clients have gone have to end at once.

    Raises:
        UserError: some have not.
    """
    deadline = now() + IDLE_SECONDS
    while now() < deadline:
        text = (await http.get("/metrics")).text
        if {"vispec_waiting_answers 0", "vispec_running_answers 0"} <= set(text.splitlines()):
            return
        await asyncio.sleep(0.1)
    raise UserError(f"answers are still being made, {IDLE_SECONDS} seconds after the last client has gone")


if __name__ == "__main__":
    run_cli(main)
