"""Serve a target with its draft as OpenAI's API: `python -m vispec.serve --base-model-path … --spec-model-path …`."""

import argparse
import asyncio
import logging
import os
import re
import signal
import socket
from contextlib import suppress
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path

import uvicorn

from vispec.cli import Parser, UserError, count, leave_interrupted, limit, run_cli, whole
from vispec.evaluation.flags import add_tree_flags, asked_place
from vispec.evaluation.loading import keep_prompts, load_model, quiet_transformers
from vispec.evaluation.pair_flags import add_pair_flags, asked_pair
from vispec.model.shape import AUTO, TUNE
from vispec.prompts import build_inputs, load_processor, user_turn
from vispec.serve.guard import HeaderTimeout, HttpLimits
from vispec.serve.pictures import PictureLimits
from vispec.serve.service import Service, ServiceLimits

API_KEY = "VISPEC_API_KEY"
LOOPBACK = frozenset(("localhost", "127.0.0.1", "::1"))


def main(argv: list[str] | None = None) -> int:
    args = _make_parser().parse_args(argv)
    limits, http_limits = _limits(args)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    if args.replicas == 1:
        _check_address(args.host, args.port)
        serve(_service(args, limits), http_limits, args.host, args.port)
    else:
        from vispec.serve.replicas import serve_replicas

        load, gpus = partial(_service, args, limits), int(args.device_map != "cpu")
        serve_replicas(load, limits, http_limits, args.host, args.port, args.replicas, gpus, GRACE)
    return 0


GRACE = 20
"""Seconds for answers to end in when the server is to end; supervisors give a process 30."""


class Server(uvicorn.Server):
    """Uvicorn's, which by itself hangs up on those who are not answered when their time is over."""

    def __init__(self, config: uvicorn.Config, service: Service):
        super().__init__(config)
        self._engine = service.engine

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        ending = asyncio.get_running_loop().call_later(GRACE, self._engine.end)
        await super().shutdown(sockets)
        ending.cancel()


def serve(service: Service, limits: HttpLimits, host: str, port: int) -> None:
    """Answer requests until the process is told to end; then those that are being answered have some seconds."""
    from vispec.serve.app import make_app

    config = uvicorn.Config(
        make_app(service, limits),
        host=host,
        port=port,
        http=HeaderTimeout,
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_graceful_shutdown=GRACE + 5,
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # which uvicorn raises again when all is done
    with suppress(KeyboardInterrupt):
        Server(config, service).run()


def _check_address(host: str, port: int) -> None:
    """Before a model is loaded, which takes minutes.

    Raises:
        UserError: nobody can listen there.
    """

    async def listen() -> None:
        (await asyncio.get_running_loop().create_server(asyncio.Protocol, host, port)).close()

    try:
        asyncio.run(listen())
    except OSError as error:
        raise UserError(f"--host {host} --port {port}: {error.strerror}") from None


def _service(args: argparse.Namespace, limits: ServiceLimits) -> Service:
    """Loaded in a thread that ends thereby.

    OpenMP gives each thread that computes threads of its own. Once all of these are more than the cores, they sleep
    between two products, and decoding takes several times as long.
    """
    with ThreadPool(1) as own:
        try:
            return own.apply(_load, (args, limits))
        except KeyboardInterrupt:
            leave_interrupted()  # nothing else ends the thread


def _load(args: argparse.Namespace, limits: ServiceLimits) -> Service:
    base, spec, tree, dtype = asked_pair(args)
    quiet_transformers()
    processor = load_processor(base)
    place = {f"spec_{name}": value for name, value in asked_place(args).items()}
    options = {"dtype": dtype, "device_map": args.device_map}
    if args.plain:
        model = load_model(base, None, **options)
    else:
        tree = None if (tunes := tree == TUNE) else tree
        options |= {"method": args.method, "skip_visual": args.skip_visual, "draft_image_rows": args.draft_image_rows}
        model = load_model(base, spec, tree=tree, **options, **place)
        if tunes:
            model.tune([build_inputs(processor, [user_turn(QUESTION)], "")])
    keep_prompts(model, args.prefix_cache)
    name = args.served_model_name or Path(base).name
    return Service(model, processor, name, limits)


QUESTION = "Describe a street on a rainy day."
"""What --tree tune is measured on."""


def _limits(args: argparse.Namespace) -> tuple[ServiceLimits, HttpLimits]:
    total = args.max_tokens_total or 4096 * args.max_batch
    if total < 2 * args.max_batch:
        raise UserError(f"--max-tokens-total {total}: --max-batch {args.max_batch} needs two tokens for each row")
    for host in args.allow_url:
        if not re.fullmatch(r"[\w.-]+", host):
            raise UserError(f"--allow-url {host}: expected the name of a host alone")
    pictures = PictureLimits(args.max_pixels, args.max_images, frozenset(host.lower() for host in args.allow_url))
    service = ServiceLimits(args.max_batch, total, args.max_queue, args.timeout, pictures)
    for flag, value in (("--host", args.host), ("--api-key", args.api_key)):
        if value == "":  # as of a variable that is not set: everybody could ask
            raise UserError(f"{flag} is empty")
    key = args.api_key or os.environ.get(API_KEY) or None
    # only this machine can ask, and of it no page that makes its own name mean this machine
    hosts = LOOPBACK if args.host in LOOPBACK else None
    return service, HttpLimits(body_bytes=args.max_body_mb * 2**20, api_key=key, hosts=hosts)


def _port(text: str) -> int:
    if (port := whole(text)) > 65535:
        raise argparse.ArgumentTypeError(f"expected a port up to 65535, found {text!r}")
    return port


def _make_parser() -> Parser:
    parser = Parser(prog="python -m vispec.serve", description="Serve a target with its draft as OpenAI's API.")
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 is all (default: %(default)s)")
    add("--port", type=_port, default=8000, help="0 takes a free one (default: %(default)s)")
    add_pair_flags(parser)
    add("--served-model-name", metavar="NAME", help="what clients call the model (default: the target's name)")
    add("--replicas", type=count, default=1, metavar="N",
        help="copies on the machines of a Ray cluster, a GPU each (default: one, without Ray)")  # fmt: skip
    parser.add_bool("--plain", "decode without the draft, to compare with")
    add("--api-key", metavar="KEY", help=f"what clients have to send (default: {API_KEY}, or none)")
    add("--allow-url", nargs="+", default=[], metavar="HOST", help="from which images are fetched (default: none)")
    add("--max-batch", type=count, default=8, help="answers that are made together (default: %(default)s)")
    add("--max-tokens-total", type=count, help="tokens of all of them, prompts too (default: 4096 for each)")
    add("--prefix-cache", type=whole, default=0, metavar="TOKENS",
        help="of kept prompts, from which further ones are read on (default: none)")  # fmt: skip
    add("--max-queue", type=count, default=64, help="answers that may wait (default: %(default)s)")
    add("--timeout", type=limit, default=600.0, help="seconds for an answer (default: %(default)g)")
    add("--max-images", type=count, default=16, help="of a request (default: %(default)s)")
    add("--max-pixels", type=count, default=16_000_000, help="of an image (default: %(default)s)")
    add("--max-body-mb", type=count, default=32, help="MiB of a request (default: %(default)s)")
    add_tree_flags(parser, AUTO)
    parser.add_hardware(dtype=None)
    return parser


if __name__ == "__main__":
    run_cli(main)
