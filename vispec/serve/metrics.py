"""What the server counts, in Prometheus' text format."""

import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping
from itertools import accumulate

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""Upper bounds of the histograms' buckets."""


class Histogram:
    """Seconds, by how many of them are below each bound."""

    def __init__(self):
        self._counts, self._sum = [0] * (len(SECONDS) + 1), 0.0

    def add(self, seconds: float) -> None:
        self._counts[bisect_left(SECONDS, seconds)] += 1
        self._sum += seconds

    def lines(self, name: str, what: str) -> list[str]:
        below = list(accumulate(self._counts))
        bounds = [*map(str, SECONDS), "+Inf"]
        buckets = [f'{name}_bucket{{le="{bound}"}} {count}' for bound, count in zip(bounds, below, strict=True)]
        head = _head(name, "histogram", what)
        return [*head, *buckets, f"{name}_sum {self._sum:.6f}", f"{name}_count {below[-1]}"]


class Metrics:
    """Of one server; told by several threads."""

    def __init__(self):
        self._lock = threading.Lock()
        self._requests: Counter[int] = Counter()
        self._tokens = self._prompt_tokens = self._reused = self._rounds = self._levels = self._accepted = 0
        self._waiting = self._running = 0
        self._first, self._between = Histogram(), Histogram()

    def answered(self, status: int) -> None:
        """A request has been answered, with this HTTP status."""
        with self._lock:
            self._requests[status] += 1

    def told(self, tokens: int, levels: int, accepted: int, seconds: float, prompt: int | None, reused: int) -> None:
        """An answer has grown.

        Args:
            tokens: by so many.
            levels: of the draft's tree, the most tokens of it that may be accepted; 0: there was none.
            accepted: of the draft.
            seconds: since it grew last, or since it was asked for.
            prompt: tokens of its prompt, where it has begun with them.
            reused: of these, those that were not read again.
        """
        with self._lock:
            self._tokens += tokens
            self._rounds += levels > 0
            self._levels += levels
            self._accepted += accepted
            self._reused += reused
            if prompt is not None:
                self._prompt_tokens += prompt
                self._first.add(seconds)
            else:
                for _ in range(tokens):  # those of one round come together
                    self._between.add(seconds / tokens)

    def show(self, waiting: int, running: int) -> None:
        """Answers in the queue, and those that are being made."""
        self._waiting, self._running = waiting, running

    def text(self) -> str:
        with self._lock:
            tau = self._accepted / self._rounds if self._rounds else 0.0
            share = self._accepted / self._levels if self._levels else 0.0
            lines = _head("vispec_requests_total", "counter", "requests by HTTP status")
            lines += [f'vispec_requests_total{{status="{status}"}} {n}' for status, n in sorted(self._requests.items())]
            for name, kind, what, value in (
                ("prompt_tokens_total", "counter", "tokens of prompts", self._prompt_tokens),
                ("reused_prompt_tokens_total", "counter", "those of them that were not read again", self._reused),
                ("tokens_total", "counter", "tokens of answers", self._tokens),
                ("rounds_total", "counter", "rounds with a draft, of each answer", self._rounds),
                ("accepted_tokens_total", "counter", "draft tokens that were accepted", self._accepted),
                ("tau", "gauge", "accepted draft tokens a round", f"{tau:.6g}"),
                ("accepted_share", "gauge", "accepted draft tokens by levels of the trees", f"{share:.6g}"),
                ("waiting_answers", "gauge", "answers in the queue", self._waiting),
                ("running_answers", "gauge", "answers that are being made", self._running),
            ):
                lines += [*_head(f"vispec_{name}", kind, what), f"vispec_{name} {value}"]
            lines += self._first.lines("vispec_first_token_seconds", "from the request to its first token")
            lines += self._between.lines("vispec_between_tokens_seconds", "from one token to the next")
            return "\n".join([*lines, ""])


def together(texts: Mapping[str, str]) -> str:
    """Texts of several servers as one, with a label that says which.

    >>> print(together({"a": "# TYPE n counter\\nn 1", "b": '# TYPE n counter\\nn{of="x"} 2'}), end="")
    # TYPE n counter
    n{replica="a"} 1
    n{replica="b",of="x"} 2
    """
    samples: dict[str, list[str]] = {}
    for replica, text in texts.items():
        for line in text.splitlines():
            if line.startswith("#"):
                below = samples.setdefault(line, [])
                continue
            name, _, labels = line.rpartition(" ")[0].partition("{")
            label = f'replica="{replica}"' + ("," + labels if labels else "}")
            below.append(f"{name}{{{label} {line.rpartition(' ')[2]}")
    return "".join(f"{line}\n" for head, below in samples.items() for line in (head, *below))


def _head(name: str, kind: str, what: str) -> list[str]:
    return [f"# HELP {name} {what}", f"# TYPE {name} {kind}"]
