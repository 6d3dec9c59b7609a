"""Several models at a time: Ray actors, each with a target and its drafts, share the questions.

Only the driver writes answer files. Speeds are compared, so all actors have to have GPUs of one kind.
"""

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager

from vispec.cli import UserError
from vispec.evaluation.answerer import Answerer, Ask, LeftOut, Outcome
from vispec.evaluation.loading import Models
from vispec.ray_pool import MOST_DEATHS, Pool


@contextmanager
def loaded(models: Models, gpus_total: int) -> Iterator["Answerer | Actors"]:
    """The models in this process, or once for every `models.gpus` of all GPUs in actors."""
    if gpus_total > 1 and gpus_total % models.gpus:
        raise UserError(f"--num-gpus-total {gpus_total}: expected a multiple of --num-gpus-per-model {models.gpus}")
    copies = gpus_total // models.gpus
    if copies <= 1:
        yield Answerer(models)
        return
    gpus = 0 if models.device_map == "cpu" else models.gpus
    with closing(Pool(Answerer, [models], copies, gpus, "--num-gpus-total")) as pool:
        yield Actors(pool)


class Actors:
    """Does what an `Answerer` does, by several of them."""

    def __init__(self, pool: Pool):
        self._pool = pool

    def loaded_settings(self) -> dict[str, dict]:
        return self._pool.settings

    def answers(self, asks: Sequence[Ask]) -> Iterator[tuple[Ask, Outcome]]:
        """Every actor answers one question at a time; answers come as they are ready."""
        for ask, outcome in self._pool.results(asks, lambda actor, ask: actor.answer.remote(ask)):
            if outcome is None:
                outcome = LeftOut(ask.question.question_id, f"{MOST_DEATHS} actors died while they answered it", "died")
            yield ask, outcome
