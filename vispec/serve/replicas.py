"""Copies of the server on the machines of a Ray cluster: Ray Serve's proxy shares requests among them.

A copy that dies, or whose decoding thread has, is replaced; what it was answering ends with an error.
"""

import logging
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import replace
from typing import NoReturn

from vispec.cli import UserError, say
from vispec.ray_pool import machines, reason, shared_gpus, start_ray, working_in
from vispec.serve.app import RETRY_AFTER, make_app
from vispec.serve.guard import Guard, HttpLimits
from vispec.serve.metrics import together
from vispec.serve.service import Service, ServiceLimits

FLAG = "--replicas"
APPLICATION, DEPLOYMENT = "vispec", "Replica"
"""As Ray Serve knows us."""
HEALTH_SECONDS = 5.0
"""Between two of Ray's looks at a replica."""
LOOK_SECONDS = 1.0
"""Between two looks at how many there are."""
METRICS_SECONDS = 5.0
"""For all replicas to say what they have counted."""
LOGS = {"log_level": "WARNING", "enable_access_log": False}
"""Of Ray Serve: there is an access log of ours."""


class Replica:
    """One copy, in a process of its own.

    Args:
        load: makes what answers.
    """

    def __init__(self, load: Callable[[], Service], limits: HttpLimits):
        from ray import serve

        # beside what Ray Serve writes about this replica
        logging.basicConfig(level=logging.INFO, handlers=logging.getLogger("ray.serve").handlers)

        context = serve.get_replica_context()
        self._name = context.replica_id.unique_id
        self._all = serve.get_deployment_handle(DEPLOYMENT, APPLICATION)
        self._service, self._limits = load(), limits

    def __serve_build_asgi_app__(self) -> Guard:
        return make_app(self._service, self._limits, self._metrics)

    def check_health(self) -> None:
        if not self._service.engine.alive:
            raise RuntimeError("the decoding thread has ended")

    def counted(self) -> tuple[str, str]:
        return self._name, self._service.metrics.text()

    async def _metrics(self) -> str:
        asked = self._all.broadcast("counted")
        found = await asked.results_async(timeout_s=METRICS_SECONDS, return_exceptions=True)
        return together(dict(one for one in found if not isinstance(one, BaseException)))


def serve_replicas(
    load: Callable[[], Service],
    limits: ServiceLimits,
    http_limits: HttpLimits,
    host: str,
    port: int,
    replicas: int,
    gpus: int,
    grace: float,
) -> None:
    """Answer requests until the process is told to end; then those that are being answered have some seconds.

    Args:
        gpus: of each replica, where the cluster has any.
        grace: seconds.

    Raises:
        UserError: Ray Serve is not installed or in use, there are not enough GPUs, or no replica can be loaded.
    """
    if not port:
        raise UserError(f"{FLAG}: Ray Serve has to be told a port, found --port 0")
    ray = start_ray(FLAG, "ray.serve")
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # Ray's own says where in its code the process was
    try:
        if (found := serve.status()).proxies:
            apps = ", ".join(found.applications) or "nothing"
            raise UserError(f"{FLAG}: Ray Serve runs on this cluster already, with {apps}; `serve shutdown` ends it")
        options = _options(ray, replicas, gpus) | _queue(limits, replicas) | {"graceful_shutdown_timeout_s": grace}
        kind = serve.deployment(name=DEPLOYMENT, **options)(serve.ingress()(working_in(os.getcwd(), Replica)))
        application = kind.bind(load, replace(http_limits, proxied=True))
        with suppress(KeyboardInterrupt), _serving(serve, application, host, port):
            _watch(serve, options["num_replicas"], f"at http://{host}:{port} of the machine of Ray's head")
    except ray.exceptions.RayActorError:
        raise UserError(f"{FLAG}: somebody has ended Ray Serve") from None
    except ray.exceptions.RayError as error:
        raise UserError(f"{FLAG}: {reason(error)}") from None
    finally:
        ray.shutdown()


def _options(ray, replicas: int, gpus: float) -> dict:
    """Of the deployment: how many replicas, and what each has of its machine."""
    here = machines(ray)
    replicas, gpus = shared_gpus(here, replicas, gpus, FLAG)
    cores = 1 if gpus else shared_cores(here, replicas)
    say(f"{replicas} replicas begin, each with {gpus:g} GPU(s) and {cores} core(s)")
    return {
        "num_replicas": replicas,
        "ray_actor_options": {"num_gpus": gpus, "num_cpus": cores},
        "health_check_period_s": HEALTH_SECONDS,
        "max_constructor_retry_count": 1,
        "logging_config": LOGS,
    }


def _queue(limits: ServiceLimits, replicas: int) -> dict:
    """So many may be at a replica that it is the one to refuse what it has no room for.

    What Ray lets wait is on its way there, or no replica is alive.
    """
    from vispec.serve.routing import LeastBusy

    most = 2 * (limits.batch + 2 * limits.waiting)
    return {
        "max_ongoing_requests": most,
        "max_queued_requests": replicas * most,
        "backpressure_config": {"status_code": 429, "retry_after_s": int(RETRY_AFTER)},
        "request_router_config": {"request_router_class": LeastBusy},
    }


@contextmanager
def _serving(serve, application, host: str, port: int) -> Iterator[None]:
    try:
        serve.start("HeadOnly", {"host": host, "port": port}, logging_config=LOGS)
        serve.run_many([serve.RunTarget(application, APPLICATION)], wait_for_applications_running=False)
        yield
    finally:
        found = serve.status()
        if APPLICATION in found.applications:
            serve.delete(APPLICATION)
        if found.proxies and not serve.status().applications:  # nobody else has begun to use it
            with redirect_stdout(None):  # where Ray calls the end of its own process a failed task
                serve.shutdown()


def _watch(serve, replicas: int, where: str) -> NoReturn:
    """Say how many replicas answer, and what Ray knows of why not all do, whenever that changes.

    Raises:
        UserError: none of them can be loaded, or they have been ended.
    """
    before = f"0 of {replicas} replicas answer {where}"
    while True:
        application = serve.status().applications.get(APPLICATION)
        if application is None:
            raise UserError(f"{FLAG}: somebody has ended the replicas")
        found = application.deployments[DEPLOYMENT]
        why = reason(found.message) if found.message else ""
        if found.status == "DEPLOY_FAILED":
            raise UserError(f"{FLAG}: a replica could not be loaded: {why}")
        answer = found.replica_states.get("RUNNING", 0)
        now = f"{answer} of {replicas} replicas answer {where}" + (f" ({why})" if why and answer < replicas else "")
        if now != before:
            say(now)
            before = now
        time.sleep(LOOK_SECONDS)


def shared_cores(machines: Sequence[dict[str, float]], replicas: int) -> int:
    """The most cores that each of so many replicas can have; 0 where there are more replicas than cores.

    >>> shared_cores([{"CPU": 5.0}, {"CPU": 3.0}], 3), shared_cores([{"CPU": 2.0}], 3)
    (2, 0)
    """
    each = [int(machine.get("CPU", 0)) for machine in machines]
    return next((most for most in range(max(each), 0, -1) if sum(one // most for one in each) >= replicas), 0)
