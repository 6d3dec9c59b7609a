"""Copies of what takes long to load, in Ray actors that share items of work.

On one machine Ray starts by itself; where a cluster runs (`ray start`), its machines are used too, and models and data
have to be found under the same paths on all of them. An actor that dies, alone or with its machine, is replaced and its
item given to another one; an item that several actors have died of is given up.
"""

import importlib
import logging
import os
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Protocol, TypeVar

from vispec.cli import UserError, say

MOST_DEATHS = 2
"""Actors that may die of an item before it is given up."""

SHARES_OF_A_GPU = 10_000
"""Ray counts GPUs in these."""

Item = TypeVar("Item")


class Loaded(Protocol):
    """What an actor holds."""

    def loaded_settings(self) -> dict[str, dict]:
        """What has been loaded; it must be the same in all copies."""


class Pool:
    """Copies of the same in processes of their own.

    Args:
        kind: class of the copies.
        arguments: for its constructor, which loads.
        copies: None for as many as the GPUs have room for, or where Ray has no GPU one on each machine.
        gpus: of each copy, where Ray has any; below 1, several share one.
        flag: with which the user has asked for this.

    Raises:
        UserError: Ray is not installed or has not enough GPUs, a copy cannot be loaded, or copies differ.
    """

    def __init__(self, kind: type[Loaded], arguments: Sequence, copies: int | None, gpus: float, flag: str):
        self._ray, self._flag, self._arguments = start_ray(flag), flag, arguments
        # calls of `loaded_settings` that actors in place of dead ones have not answered yet
        self._starting: dict = {}
        try:
            copies, gpus = shared_gpus(machines(self._ray), copies, gpus, flag)
            say(f"{copies} Ray actors begin, each with {gpus:g} GPU(s)")
            # spread, since Ray would fill one machine first
            remote = self._ray.remote(num_gpus=gpus, scheduling_strategy="SPREAD")
            self._kind = remote(working_in(os.getcwd(), kind))
            self._actors = [self._start() for _ in range(copies)]
            self.settings = self._common_settings()
        except BaseException:
            self.close()
            raise

    def results(self, items: Iterable[Item], call: Callable) -> Iterator[tuple[Item, object]]:
        """What calls return, in the order in which they do; None for an item that is given up.

        Args:
            items: every actor is at one of them at a time.
            call: makes the remote call of an actor, with an item.

        Raises:
            UserError: all actors have died.
        """
        ray = self._ray
        waiting, idle = deque((item, 0) for item in items), list(self._actors)
        busy = {}
        while waiting or busy:
            while waiting and idle:
                actor, (item, deaths) = idle.pop(), waiting.popleft()
                busy[call(actor, item)] = actor, item, deaths
            if not busy and not self._starting:
                raise UserError(f"{self._flag}: all actors have died; {len(waiting)} calls are left")
            (ready,), _ = ray.wait([*self._starting, *busy], num_returns=1)
            if ready in self._starting:
                actor = self._starting.pop(ready)
                if self._is_as_the_others(actor, ready):
                    self._actors.append(actor)
                    idle.append(actor)
                continue
            actor, item, deaths = busy.pop(ready)
            try:
                result = ray.get(ready)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from error  # what was raised there
            except ray.exceptions.RayError:
                self._replace(actor)
                if deaths + 1 < MOST_DEATHS:
                    waiting.append((item, deaths + 1))
                else:
                    yield item, None
            else:
                idle.append(actor)
                yield item, result

    def close(self) -> None:
        self._ray.shutdown()

    def _start(self):
        return self._kind.remote(*self._arguments)

    def _replace(self, actor) -> None:
        say("notice: an actor has died; another one starts in its place")
        self._actors.remove(actor)
        self._ray.kill(actor)  # it lives on where only the way to it is lost
        new = self._start()
        self._starting[new.loaded_settings.remote()] = new

    def _is_as_the_others(self, actor, settings) -> bool:
        """Whether an actor in place of a dead one has loaded what they have; otherwise it is not used."""
        try:
            found = self._ray.get(settings)
        except self._ray.exceptions.RayError as error:
            say(f"notice: an actor in place of a dead one could not be loaded: {reason(error)}")
            return False
        if found == self.settings:
            return True
        self._ray.kill(actor)
        what = _differences([self.settings, found])
        say(f"notice: an actor in place of a dead one is not used, it has loaded {what}")
        return False

    def _common_settings(self) -> dict[str, dict]:
        try:
            found = self._ray.get([actor.loaded_settings.remote() for actor in self._actors])
        except self._ray.exceptions.RayError as error:
            raise UserError(f"{self._flag}: a copy could not be loaded: {reason(error)}") from None
        if any(one != found[0] for one in found):
            differences = _differences(found)
            raise UserError(f"{self._flag}: expected the same models and GPUs on all machines; found {differences}")
        return found[0]


def machines(ray) -> list[dict[str, float]]:
    """What each machine of the cluster has."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def shared_gpus(
    machines: Sequence[dict[str, float]], copies: int | None, gpus: float, flag: str
) -> tuple[int, float]:
    """How many copies there are to be, and the GPUs of each; of what is asked for as `Pool` takes it.

    Raises:
        UserError: there are not enough GPUs.
    """
    gpus = _whole_shares(gpus) if any("GPU" in machine for machine in machines) else 0
    room = sum(int(machine.get("GPU", 0) / gpus) if gpus else 1 for machine in machines)
    copies = copies or max(room, 1)
    if gpus and copies > room:
        raise UserError(f"{flag}: {copies} copies of {gpus:g} GPU(s) asked for, Ray has room for {room}")
    return copies, gpus


def _whole_shares(gpus: float) -> float:
    """As Ray takes it; below 1 as many share a GPU as the inverse, rounded, says.

    >>> _whole_shares(2), _whole_shares(0.5), _whole_shares(0.34)
    (2, 0.5, 0.3333)
    """
    return gpus if gpus >= 1 or not gpus else SHARES_OF_A_GPU // round(1 / gpus) / SHARES_OF_A_GPU


def working_in(folder: str, kind: type) -> type:
    """The class, with relative paths as they are meant in a folder, on a machine that has it."""

    class Actor(kind):
        def __init__(self, *arguments):
            with suppress(OSError):
                os.chdir(folder)
            super().__init__(*arguments)

    return Actor


def reason(error: Exception | str) -> str:
    """What was raised in an actor, without the traceback before it."""
    return str(error).strip().splitlines()[-1]


def _differences(found: Sequence[dict[str, dict]]) -> str:
    """The settings that are not the same everywhere, with all their values."""
    values: dict[tuple[str, str], set[str]] = defaultdict(set)
    for one in found:
        for method, settings in one.items():
            for name, value in settings.items():
                values[method, name].add(str(value))
    # what differs of the target differs for every method
    differing = {f"{name} {' and '.join(sorted(all_))}" for (_, name), all_ in values.items() if len(all_) > 1}
    return ", ".join(sorted(differing))


def start_ray(flag: str, needs: str = "ray"):
    """Ray, started or connected to the cluster that runs.

    Args:
        needs: module of Ray that will be used.

    Raises:
        UserError: it is not installed, or a cluster that it was told of does not answer.
    """
    try:
        importlib.import_module(needs)
        import ray
    except ImportError:
        raise UserError(f"{flag}: several models at a time need Ray: pip install 'vispec[ray]'") from None
    try:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except ConnectionError as error:
        raise UserError(f"{flag}: {error}; `ray stop` forgets a cluster that this machine had") from None
    return ray
