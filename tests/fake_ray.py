"""As much of Ray as a pool needs, in this process."""

from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace


class ActorDied(Exception):
    """What is raised for a dead actor."""


class OneProcess:
    """A call is made when its result is asked for."""

    exceptions = SimpleNamespace(RayError=ActorDied, RayTaskError=())

    def __init__(self, machines: Sequence[dict] = ({"CPU": 2.0},)):
        self.machines, self.killed = machines, []

    def remote(self, **options):
        self.options = options
        return lambda kind: SimpleNamespace(remote=lambda *arguments: self._Handle(kind(*arguments)))

    class _Handle:
        def __init__(self, actor):
            self.actor = actor

        def __getattr__(self, name):
            return SimpleNamespace(remote=lambda *arguments: partial(getattr(self.actor, name), *arguments))

    def get(self, calls):
        return [call() for call in calls] if isinstance(calls, list) else calls()

    def wait(self, calls, num_returns: int):
        return calls[:1], calls[1:]

    def kill(self, handle):
        self.killed.append(handle.actor)

    def nodes(self):
        return [{"Alive": True, "Resources": resources} for resources in self.machines]

    def shutdown(self):
        pass
