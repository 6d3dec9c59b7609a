"""Products with the weights of linear layers: joined, and by the kernel that is the fastest where they run.

Linear layers that read the same input (q, k and v; gate and up) are one product over one joined matrix. Their
parameters become views of it, so nothing is stored twice, and whoever trains, saves or moves the model meets the
parameters that it always had.

With a few tokens on a CPU a library's call may take longer than the arithmetic, and which call is the fastest depends
on processor, size and number of tokens: so candidates are timed, on several matrices of a size in turn, as decoding
reads them. What was found is kept in the user's cache folder, so that all processes and both arms of a comparison use
the same kernels. Some candidates read copies of the matrix in an order of their own; a model's copies take at most
`MOST_BYTES`.

R rows of one product, I and O input and output features.
"""

import contextlib
import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path

import torch
from torch import nn

from vispec.remembered import recall, remember
from vispec.timing import now

Kernel = Callable[[torch.Tensor], torch.Tensor]
"""(R, I) -> (R, O)."""

MOST_BYTES = 2**31
"""Of the copies that kernels of one model may hold together."""
MOST_ROWS = 128
"""Products of more rows are left to PyTorch."""
TIMED_MATRICES, TIMED_ROUNDS, TIMED_SECONDS = 32, 7, 0.02
"""Matrices of one size that take turns, and how often; a candidate that takes longer than this has fewer rounds."""
LEAST_GAIN = 0.95
"""A kernel with a copy must take less than this share of the time of the one without."""
SAMPLED = 256
"""Numbers of a copied matrix that are compared with every prompt."""
AGREEMENT = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""Largest difference to PyTorch's own product, relative to its largest number."""


class Products:
    """The products of one model, whose copies share `MOST_BYTES`."""

    def __init__(self):
        self._made: dict[tuple[int, ...], Product] = {}

    def of(self, *layers: nn.Linear) -> "Product":
        """The product of these layers, the same one at each call."""
        key = tuple(map(id, layers))
        if key not in self._made:
            self._made[key] = Product(*layers)
        return self._made[key]

    def linear(self, layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        """(…, I) -> (…, O) through the product of one layer; autocast, which knows no products, through the layer."""
        if torch.is_autocast_enabled(x.device.type):
            return layer(x)
        return self.of(layer)(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], layer.out_features)

    def expect(self, rows: Iterable[int], layer: nn.Linear | None = None) -> None:
        """Choose kernels for so many rows, in the product of one layer or in all that there are."""
        expecting = list(self._made.values()) if layer is None else [self.of(layer)]
        rows = set(rows)
        if any(rows - product.rows for product in expecting):
            for product in expecting:
                product.rows |= rows
            choose_kernels(self._made.values())

    def refresh(self) -> bool:
        """Follow the layers: weights may have been loaded, trained or moved since the last prompt.

        Returns:
            Whether there are other products than before.
        """
        stale = {key: product for key, product in self._made.items() if not product.current}
        for key, product in stale.items():
            self._made[key] = Product(*product.layers)
            self._made[key].rows |= product.rows
        if stale:
            choose_kernels(self._made.values())
        return bool(stale)

    @property
    def kernels(self) -> dict[str, str]:
        """The names of the kernels that were chosen, by what they multiply."""
        return {_key(product, rows): name for product in self._made.values() for rows, name in product.chosen.items()}

    def forget(self) -> None:
        """Make all products anew when they are asked for, and choose no kernels until they are expected."""
        self._made.clear()


class Product:
    """x W^T + b of one or several linear layers over the same input, side by side."""

    def __init__(self, *layers: nn.Linear):
        self.layers = layers
        self.rows: set[int] = set()
        """Numbers of rows for which kernels are to be chosen."""
        self.kernels: dict[int, Kernel] = {}
        self.chosen: dict[int, str] = {}
        """Their names."""
        self.copies: dict[str, Kernel] = {}
        """Those among them that read a copy, see `_copy`."""
        self.held: dict[str, int] = {}
        """Bytes of these copies."""
        with torch.inference_mode(False), torch.no_grad():
            self.weight = _join([layer.weight for layer in layers])
            self.bias = _join([layer.bias for layer in layers]) if layers[0].bias is not None else None
            self.plain = _linear(self, 0)
            self._sample = self._sampled().clone()
        self._marks = self._marked()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(R, I) -> (R, O), without gradients."""
        return self.kernels.get(x.shape[0], self.plain)(x)

    @property
    def current(self) -> bool:
        """Whether the layers' parameters are those that were joined and copied, with the same numbers.

        A change by way of `.data` leaves no mark on a parameter. Only copies mind, so where there are any, some numbers
        are compared.
        """
        return self._marks == self._marked() and (not self.held or torch.equal(self._sample, self._sampled()))

    @property
    def kind(self) -> tuple[int, int, bool]:
        return *self.weight.shape, self.bias is not None

    def _sampled(self) -> torch.Tensor:
        numbers = self.weight.view(-1)
        return numbers[:: max(len(numbers) // SAMPLED, 1)]

    def _marked(self) -> list[tuple]:
        parameters = [p for layer in self.layers for p in (layer.weight, layer.bias) if p is not None]
        return [(id(p), p.data_ptr(), p._version) for p in parameters]


def obstacle(layers: Sequence[nn.Module]) -> str | None:
    """Why these layers cannot be one product; None if they can."""
    for layer in layers:
        if type(layer) is not nn.Linear:
            return f"a linear layer is a {type(layer).__name__}"
        if has_hooks(layer):
            return "a linear layer has hooks"
        if layer.weight.is_meta or layer.weight.is_inference():
            return "weights are not in memory, or were made in inference mode"
    if len({(layer.weight.dtype, layer.weight.device, layer.bias is None) for layer in layers}) > 1:
        return "layers over one input differ in dtype, device or bias"
    return None


def has_hooks(module: nn.Module) -> bool:
    """Whether something else than its class says what a module computes, or where."""
    own = "forward" in vars(module) or hasattr(module, "_hf_hook")
    return own or bool(module._forward_hooks or module._forward_pre_hooks)


def _join(parameters: Sequence[nn.Parameter]) -> torch.Tensor:
    """The parameters one below the other, in one tensor that they become views of."""
    first = parameters[0].data
    rows = [len(parameter) for parameter in parameters]
    offsets = [sum(rows[:i]) * first.stride(0) * first.element_size() for i in range(len(rows))]
    together = all(p.data_ptr() == first.data_ptr() + offset for p, offset in zip(parameters, offsets, strict=True))
    same_storage = len({parameter.untyped_storage().data_ptr() for parameter in parameters}) == 1
    if together and same_storage:  # another SpecModel over this target has joined them
        return first.as_strided((sum(rows), *first.shape[1:]), first.stride(), first.storage_offset())
    joined = torch.cat([parameter.data for parameter in parameters])
    for parameter, view in zip(parameters, joined.split(rows), strict=True):
        parameter.data = view
    return joined


# --- kernels: each makes one for a product and a number of rows ---


def _linear(product: Product, rows: int) -> Kernel:
    """PyTorch's own product, without a copy."""
    matrix, bias = product.weight.t(), product.bias
    return partial(_times, matrix) if bias is None else partial(_times_plus, matrix, bias)


def _times(matrix: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.mm(x, matrix)


def _times_plus(matrix: torch.Tensor, bias: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.addmm(bias, x, matrix)


def _onednn(product: Product, rows: int) -> Kernel:
    """oneDNN with a copy in its own order; a private operator of torch."""
    packed = torch.ops.mkldnn._reorder_linear_weight(product.weight, rows)
    multiply, bias = torch.ops.mkldnn._linear_pointwise.default, product.bias
    return lambda x: multiply(x, packed, bias, "none", [], "")


def _mkl(product: Product, rows: int) -> Kernel:
    """MKL's product over a matrix packed for exactly so many rows; private operators of torch."""
    packed = torch.ops.mkl._mkl_reorder_linear_weight(product.weight, rows)
    multiply, weight, bias = torch.ops.mkl._mkl_linear.default, product.weight, product.bias
    return lambda x: multiply(x, packed, weight, bias, rows)


def _in_float32(product: Product, rows: int) -> Kernel:
    """The product in float32 over a copy in float32, rounded once: small ones are faster so on some CPUs."""
    matrix, dtype = product.weight.float().t(), product.weight.dtype
    if product.bias is None:
        return lambda x: torch.mm(x.float(), matrix).to(dtype)
    bias = product.bias.float()
    return lambda x: torch.addmm(bias, x.float(), matrix).to(dtype)


MAKERS = {"linear": _linear, "onednn": _onednn, "mkl": _mkl, "float32": _in_float32}
CANDIDATES = {torch.float32: ("linear", "onednn", "mkl"), torch.bfloat16: ("linear", "onednn", "float32")}
BYTES = {"linear": 0, "onednn": 1, "mkl": 1, "float32": 2}
"""Size of a kernel's copy, in sizes of the matrix."""
SHARED = ("onednn", "float32")
"""Kernels whose copy serves any number of rows."""


def choose_kernels(products: Iterable[Product]) -> None:
    """Let products on a CPU use the fastest kernels for the rows that they expect; others use PyTorch's own.

    Args:
        products: all of one model, since their copies share `MOST_BYTES`.
    """
    every = list(products)
    budget = MOST_BYTES - sum(size for product in every for size in product.held.values())
    waiting: dict[tuple, list[Product]] = defaultdict(list)
    for product in every:
        if product.weight.is_cpu and product.weight.dtype in CANDIDATES:
            for rows in product.rows - product.kernels.keys():
                if rows <= MOST_ROWS:
                    waiting[rows, product.kind].append(product)
    remembered = recall(_remembered_in()) if waiting else {}
    measured: dict[str, str] = {}
    for (rows, _), alike in sorted(waiting.items()):
        budget -= _choose(alike, rows, budget, remembered, measured)
    if measured:
        remember(_remembered_in(), measured)


def _choose(products: list[Product], rows: int, budget: int, remembered: Mapping[str, str], measured: dict) -> int:
    """Give products of one kind a kernel for so many rows; returns the bytes of the copies that this took."""
    name, taken = _fastest(products, rows, budget, remembered, measured), 0
    copy = _copy(name, rows)
    for product in products:
        kernel = product.plain if name == "linear" else product.copies.get(copy)
        if kernel is None:
            kernel = product.copies[copy] = MAKERS[name](product, rows)
            product.held[copy] = BYTES[name] * product.weight.nbytes
            taken += product.held[copy]
        product.kernels[rows], product.chosen[rows] = kernel, name
    return taken


def _copy(name: str, rows: int) -> str:
    """The name of the copy that a kernel reads."""
    return name if name in SHARED else f"{name} {rows}"


def _fastest(products: list[Product], rows: int, budget: int, remembered: Mapping[str, str], measured: dict) -> str:
    """The name of the kernel to use: as remembered, or measured now, which is added to `measured`."""
    dtype = products[0].weight.dtype
    fitting = [name for name in CANDIDATES[dtype] if _has(name, dtype)]
    # a copy that is there serves further rows for nothing
    size = {n: sum(p.weight.nbytes for p in products if _copy(n, rows) not in p.held) for n in fitting}
    affordable = [n for n in fitting if BYTES[n] * size[n] <= budget]
    if len(affordable) == 1:
        return affordable[0]
    key = _key(products[0], rows)
    found = remembered.get(key)
    if found not in affordable:
        found = _measure(products[:TIMED_MATRICES], rows, affordable)
        if affordable == fitting:
            measured[key] = found
    return found


def _key(product: Product, rows: int) -> str:
    """What is multiplied: dtype, size and number of rows."""
    out, inputs, bias = product.kind
    return f"{str(product.weight.dtype).removeprefix('torch.')} {inputs}x{out}{'+b' if bias else ''} {rows}"


def _measure(products: list[Product], rows: int, names: list[str]) -> str:
    x = torch.randn(rows, products[0].weight.shape[1], generator=torch.Generator().manual_seed(0))
    x = x.to(products[0].weight.dtype)
    expected = [product.plain(x) for product in products]
    seconds = {}
    for name in names:
        try:
            kernels = [MAKERS[name](product, rows) for product in products]
            same = all(_agree(kernel(x), right) for kernel, right in zip(kernels, expected, strict=True))
        except Exception:  # private operators: of another release, not for this machine, …
            continue
        if same:
            seconds[name] = _timed(kernels, x)
    best = min(seconds, key=seconds.get)
    return best if seconds[best] < LEAST_GAIN * seconds["linear"] else "linear"


def _timed(kernels: list[Kernel], x: torch.Tensor) -> float:
    """Seconds of the fastest of some rounds over all kernels: what disturbs a measurement makes it longer."""
    best, begin = float("inf"), now()
    for _ in range(TIMED_ROUNDS):
        start = now()
        for kernel in kernels:
            kernel(x)
        end = now()
        best = min(best, end - start)
        if end - begin > TIMED_SECONDS:
            break
    return best


def _agree(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    difference = (ours.float() - theirs.float()).abs().max()
    return bool(difference <= AGREEMENT[theirs.dtype] * theirs.float().abs().max())


def _has(name: str, dtype: torch.dtype) -> bool:
    """Whether this build of torch has the private operators of a kernel, for this dtype on this machine."""
    if name == "onednn":
        there = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        return there and (dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if name == "mkl":
        return torch.backends.mkl.is_available() and hasattr(torch.ops.mkl, "_mkl_linear")
    return True


# --- the kernels that were found to be the fastest, in a file for each machine, number of threads and torch ---


def _remembered_in() -> str:
    machine = f"{_processor()} {torch.get_num_threads()} {torch.__version__}"
    return f"kernels-{hashlib.sha256(machine.encode()).hexdigest()[:16]}.json"


@cache
def _processor() -> str:
    """What a CPU is and can do: with and without AMX the same name is in use."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return "".join(next((line for line in lines if line.startswith(name)), "") for name in ("model name", "flags"))
    return torch.backends.cpu.get_cpu_capability()
