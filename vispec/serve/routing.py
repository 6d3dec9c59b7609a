"""Which replica gets a request."""

from collections.abc import Sequence

from ray.serve.request_router import FIFOMixin, PendingRequest, RequestRouter, RunningReplica


class LeastBusy(FIFOMixin, RequestRouter):
    """The one with the fewest of all.

    By default Ray fills those on the machine where a request came in before it asks others.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> Sequence[list[RunningReplica]]:
        """Among which Ray takes the one with the fewest requests."""
        return [candidate_replicas]
