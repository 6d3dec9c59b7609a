"""Several models at a time: Ray actors, each with a target and its drafts, share the questions.

On one machine Ray starts by itself; where a cluster runs (`ray start`), its machines' GPUs are used too, and models and
benchmarks have to be found under the same paths on all of them. Only the driver writes answer files. An actor that dies
is replaced and its question asked again; a question that several actors have died of is given up.
"""

import logging
import sys
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from vispec.cli import UserError
from vispec.evaluation.answerer import Answerer, Ask, LeftOut, Outcome
from vispec.evaluation.loading import Models

MOST_DEATHS = 2
"""Actors that may die of a question before it is given up."""


@contextmanager
def loaded(models: Models, gpus_total: int) -> Iterator["Answerer | Actors"]:
    """The models in this process, or once for every `models.gpus` of all GPUs in actors."""
    if gpus_total > 1 and gpus_total % models.gpus:
        raise UserError(f"--num-gpus-total {gpus_total}: expected a multiple of --num-gpus-per-model {models.gpus}")
    copies = gpus_total // models.gpus
    if copies <= 1:
        yield Answerer(models)
        return
    actors = Actors(models, copies)
    try:
        yield actors
    finally:
        actors.close()


class Actors:
    """Copies of the same loaded models in processes of their own."""

    def __init__(self, models: Models, copies: int):
        """Start Ray and `copies` actors, and wait until they have loaded their models.

        Raises:
            UserError: Ray is not installed or has not enough GPUs, a model cannot be loaded, or GPUs or models differ.
        """
        self._ray = _ray()
        gpus = 0 if models.device_map == "cpu" else models.gpus
        found = self._ray.cluster_resources().get("GPU", 0)
        if copies * gpus > found:
            self.close()
            raise UserError(
                f"--num-gpus-total: {copies} models need {copies * gpus} GPUs, Ray has {found:g} (on CPUs: "
                "--device-map cpu)"
            )
        self._kind = self._ray.remote(num_gpus=gpus)(Answerer)
        self._models = models
        self._actors = []
        for _ in range(copies):
            self._start()
        try:
            self._settings = self._common_settings()
        except BaseException:
            self.close()
            raise

    def loaded_settings(self) -> dict[str, dict]:
        return self._settings

    def answers(self, asks: Sequence[Ask]) -> Iterator[tuple[Ask, Outcome]]:
        """Every actor answers one question at a time; answers come as they are ready."""
        ray = self._ray
        waiting, idle = deque(asks), list(self._actors)
        deaths: Counter[int | str] = Counter()
        # what each actor is at that is not idle; a new one is at None until it has told what it has loaded
        busy = {}
        while waiting or any(ask for _, ask in busy.values()):
            while waiting and idle:
                actor, ask = idle.pop(), waiting.popleft()
                busy[actor.answer.remote(ask)] = actor, ask
            if not busy:
                raise UserError(f"all actors have died; {len(waiting)} questions have no answer yet")
            (ready,), _ = ray.wait(list(busy), num_returns=1)
            actor, ask = busy.pop(ready)
            try:
                outcome = ray.get(ready)
            except ray.exceptions.RayActorError:
                self._actors.remove(actor)
                if ask is None:  # one that dies while it loads is not replaced
                    continue
                new = self._start()
                busy[new.loaded_settings.remote()] = new, None
                name = ask.question.question_id
                deaths[name] += 1
                if deaths[name] < MOST_DEATHS:
                    waiting.append(ask)
                else:
                    yield ask, LeftOut(name, f"{MOST_DEATHS} actors died while they answered it", "died")
                continue
            if ask is not None:
                idle.append(actor)
                yield ask, outcome
            elif outcome == self._settings:
                idle.append(actor)
            else:  # its answers do not belong into the same files
                self._actors.remove(actor)
                ray.kill(actor)
                what = _differences([self._settings, outcome])
                print(f"an actor in place of a dead one is not used, it has loaded {what}", file=sys.stderr)

    def _start(self):
        actor = self._kind.remote(self._models)
        self._actors.append(actor)
        return actor

    def _common_settings(self) -> dict[str, dict]:
        try:
            found = self._ray.get([actor.loaded_settings.remote() for actor in self._actors])
        except self._ray.exceptions.RayActorError as error:
            reason = str(error).strip().splitlines()[-1]  # after the actor's traceback
            raise UserError(f"--num-gpus-total: a model could not be loaded: {reason}") from None
        if any(one != found[0] for one in found):
            raise UserError(
                "--num-gpus-total: expected the same models on GPUs of one kind, since speeds are compared; found "
                + _differences(found)
            )
        return found[0]

    def close(self) -> None:
        self._ray.shutdown()


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


def _ray():
    """Ray, started or connected to the cluster that runs."""
    try:
        import ray
    except ImportError:
        raise UserError("--num-gpus-total: several models at a time need Ray: pip install 'vispec[ray]'") from None
    ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    return ray
