"""A server in a thread of its own, and what it has to say."""

import base64
import threading
import time
from io import BytesIO

import uvicorn
from PIL import Image

from vispec import embedded
from vispec.prompts import Turn, build_inputs
from vispec.serve.__main__ import Server
from vispec.serve.app import make_app
from vispec.serve.guard import HeaderTimeout, HttpLimits
from vispec.serve.service import Service

NAME, KEY = "tiny", "secret"


class Served:
    """A server in a thread."""

    def __init__(self, service: Service, limits: HttpLimits):
        config = uvicorn.Config(make_app(service, limits), port=0, http=HeaderTimeout, log_config=None)
        self.service, self._server = service, Server(config, service)
        self._thread = threading.Thread(target=self._server.run)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        self.url = f"http://127.0.0.1:{self._server.servers[0].sockets[0].getsockname()[1]}"

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join()


def questions(n: int) -> list[tuple[Image.Image, str]]:
    return [(Image.open(file).convert("RGB"), text) for file, text in embedded.questions()[:n]]


def expected(model, processor, *turns: Turn, new: int = 40) -> str:
    """By transformers' generate()."""
    inputs = build_inputs(processor, list(turns), "")
    ids = model.target.model.generate(**inputs, do_sample=False, max_new_tokens=new)
    return processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).lstrip()


def data_url(image: Image.Image) -> str:
    file = BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def message(*items: str | Image.Image) -> dict:
    parts = [
        {"type": "text", "text": item}
        if isinstance(item, str)
        else {"type": "image_url", "image_url": {"url": data_url(item)}}
        for item in items
    ]
    return {"role": "user", "content": parts}
