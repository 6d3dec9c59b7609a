"""Products: the same numbers by every kernel, the fastest chosen by measuring, and what was measured remembered."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lean_targets import assert_exact, features, llava, spec
from torch import nn

from vispec import SpecModel
from vispec.model import products
from vispec.model.products import Product, Products, choose_kernels
from vispec.model.target import Target

ROWS = (1, 2, 3, 12, 30, 60)
KERNELS = [(dtype, name) for dtype, names in products.CANDIDATES.items() for name in names]


@pytest.fixture(autouse=True)
def memory(monkeypatch, tmp_path) -> Path:
    """The folder of the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "vispec"


@pytest.fixture
def measured(monkeypatch) -> list[tuple]:
    """Each measurement that is made: rows, size of the matrices, and how many take turns."""
    found, stock = [], products._measure

    def measure(alike, rows, names):
        found.append((rows, tuple(alike[0].weight.shape), len(alike)))
        return stock(alike, rows, names)

    monkeypatch.setattr(products, "_measure", measure)
    return found


def linear(out: int = 48, inputs: int = 32, bias: bool = False, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(out + inputs)
    return nn.Linear(inputs, out, bias=bias, dtype=dtype)


def wins(monkeypatch, name: str) -> None:
    """Let one kernel be the fastest wherever it is asked for."""
    monkeypatch.setattr(products, "_measure", lambda alike, rows, names: name if name in names else "linear")


@torch.inference_mode()
def assert_right(product: Product, rows: int) -> None:
    layers, generator = product.layers, torch.Generator().manual_seed(rows)
    x = torch.randn(rows, layers[0].in_features, generator=generator).to(layers[0].weight.dtype)
    found = product(x)
    right = torch.cat([F.linear(x, layer.weight, layer.bias) for layer in layers], dim=1)
    assert found.shape == right.shape and found.dtype == right.dtype
    limit = products.AGREEMENT[x.dtype] * right.float().abs().max()
    assert (found.float() - right.float()).abs().max() <= limit


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "name"), KERNELS, ids=str)
def test_every_kernel_says_what_linear_says(dtype, name, bias, monkeypatch):
    if not products._has(name, dtype):
        pytest.skip(f"this PyTorch has no {name} for {dtype} here")
    wins(monkeypatch, name)
    product = Product(*(linear(out, bias=bias, dtype=dtype) for out in (48, 16, 24)))
    product.rows |= set(ROWS)
    choose_kernels([product])
    held = set(product.held)
    assert held == set() if name == "linear" else all(copy.startswith(name) for copy in held)
    for rows in (*ROWS, 7, products.MOST_ROWS + 1):
        assert_right(product, rows)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes_have_pytorchs_own_product(dtype, measured):
    product = Product(linear(dtype=dtype), linear(16, dtype=dtype))
    product.rows |= {1, 12}
    choose_kernels([product])
    assert not measured and not product.held
    x = torch.randn(12, 32).to(dtype)
    torch.testing.assert_close(product(x), torch.cat([layer(x) for layer in product.layers], dim=1))


@pytest.mark.parametrize("dtype", products.CANDIDATES, ids=str)
def test_rows_may_have_different_kernels(dtype, monkeypatch):
    """A copy that serves any number of rows is made once, also beside a kernel without one."""
    names = [name for name in products.CANDIDATES[dtype] if products._has(name, dtype)]
    monkeypatch.setattr(products, "_measure", lambda alike, rows, _: names[rows % len(names)])
    product = Product(linear(dtype=dtype))
    for rows in ROWS:
        product.rows.add(rows)
        choose_kernels([product])
    for rows in ROWS:
        assert_right(product, rows)
    shared = [name for name in product.held if name in products.SHARED]
    assert len(shared) == len(set(shared))
    assert {name.split()[0] for name in product.held} == set(names) - {"linear"}


def test_a_linear_layer_alone_and_its_shape():
    layer, made = linear(bias=True), Products()
    x = torch.randn(2, 3, 32)
    torch.testing.assert_close(made.linear(layer, x), layer(x))
    made.expect([6], layer)
    torch.testing.assert_close(made.linear(layer, x), layer(x), rtol=1e-5, atol=1e-5)
    assert made.of(layer) is made.of(layer)


# --- which kernel ---


def slow(product, rows):
    def kernel(x):
        for _ in range(20000):
            pass
        return F.linear(x, product.weight, product.bias)

    return kernel


@pytest.mark.parametrize(("slow_one", "held"), [("float32", []), ("linear", ["float32"])])
def test_the_fastest_is_chosen(slow_one, held, monkeypatch):
    monkeypatch.setitem(products.CANDIDATES, torch.float32, ("linear", "float32"))
    monkeypatch.setitem(products.MAKERS, slow_one, slow)
    product = Product(linear())
    product.rows |= {12}
    choose_kernels([product])
    assert list(product.held) == held
    assert_right(product, 12)


def wrong_numbers(product, rows):
    return lambda x: product.plain(x) + 0.1


def raises_when_made(product, rows):
    raise RuntimeError("not on this machine")


def raises_when_called(product, rows):
    def kernel(x):
        raise NotImplementedError("no kernel for this CPU")

    return kernel


def is_not_there(product, rows):
    return torch.ops.mkldnn._an_operator_of_another_release


def takes_other_arguments(product, rows):
    return lambda: product.plain


def other_shape(product, rows):
    return lambda x: product.plain(x)[:, :1]


@pytest.mark.parametrize(
    "maker",
    [wrong_numbers, raises_when_made, raises_when_called, is_not_there, takes_other_arguments, other_shape],
    ids=lambda maker: maker.__name__,
)
@pytest.mark.parametrize("name", ["onednn", "mkl"])
def test_a_private_operator_that_does_not_work_is_not_used(name, maker, monkeypatch):
    monkeypatch.setattr(products, "_has", lambda *_: True)
    monkeypatch.setitem(products.MAKERS, name, maker)
    monkeypatch.setattr(products, "_timed", lambda kernels, x: 1.0 if kernels[0].__class__.__name__ == "partial" else 0)
    monkeypatch.setitem(products.CANDIDATES, torch.float32, ("linear", name))
    model = spec(llava())
    assert model.target.lean
    assert_exact(model)
    product = model.target._products.of(model.target.lm_head)
    assert not product.held


@pytest.mark.parametrize("name", ["onednn", "mkl"])
def test_a_private_operator_that_is_not_there_is_not_asked_for(name, monkeypatch):
    stock = products._has
    monkeypatch.setattr(products, "_has", lambda kernel, dtype: kernel != name and stock(kernel, dtype))
    asked = []
    monkeypatch.setitem(products.MAKERS, name, lambda *_: asked.append(name))
    assert_exact(spec(llava()))
    assert not asked


# --- copies ---


def test_copies_of_a_model_take_no_more_than_they_may(monkeypatch):
    wins(monkeypatch, "onednn")
    if not products._has("onednn", torch.float32):
        pytest.skip("this PyTorch has no oneDNN")
    held = {}
    vlm = llava()
    weights = sum(parameter.nbytes for parameter in decoder_weights(vlm))
    for most in (weights, weights // 2, 0):
        monkeypatch.setattr(products, "MOST_BYTES", most)
        model = spec(vlm)
        assert_exact(model)
        held[most] = copies(model.target)
        assert held[most] <= most
    assert held[weights] == weights and 0 < held[weights // 2] < weights


def decoder_weights(vlm) -> list[torch.Tensor]:
    target = Target(vlm, fast=False)
    layers = [module for module in target.decoder.modules() if isinstance(module, nn.Linear)]
    return [layer.weight for layer in [*layers, target.lm_head]]


def copies(target: Target) -> int:
    return sum(size for product in target._products._made.values() for size in product.held.values())


def test_a_copy_that_is_there_costs_other_rows_nothing(monkeypatch):
    """All of the model's bytes are taken by the copies for one number of rows; another one may use them."""
    if not products._has("onednn", torch.float32):
        pytest.skip("this PyTorch has no oneDNN")
    wins(monkeypatch, "onednn")
    product = Product(linear())
    monkeypatch.setattr(products, "MOST_BYTES", product.weight.nbytes)
    for rows in (1, 12):
        product.rows.add(rows)
        choose_kernels([product])
        assert product.kernels[rows] is not product.plain
        assert_right(product, rows)
    assert sum(product.held.values()) == product.weight.nbytes


def test_copies_follow_weights_that_change(monkeypatch):
    for name in ("onednn", "mkl", "linear"):
        wins(monkeypatch, name)
        layers, made = [linear(), linear(16)], Products()
        product = made.of(*layers)
        made.expect([1, 12])
        assert not made.refresh() and made.of(*layers) is product
        with torch.no_grad():
            layers[1].weight.mul_(-2)
        assert not product.current
        assert made.refresh() and made.of(*layers) is not product
        for rows in (1, 12, 5):
            assert_right(made.of(*layers), rows)
        assert set(made.of(*layers).kernels) == {1, 12}
        assert not made.refresh()


@torch.inference_mode()
def test_under_autocast_pytorchs_own_products_are_used(monkeypatch):
    model = spec(llava())
    expected = features(Target(llava(), fast=False))

    def broken(self, x):
        raise AssertionError("a product of ours was used")

    with torch.autocast("cpu", torch.bfloat16):
        low = features(Target(llava(), fast=False))
        monkeypatch.setattr(Product, "__call__", broken)
        found = features(model.target)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, low, strict=True))
    assert not torch.equal(low[0].float(), expected[0])


# --- what is remembered ---


def kernel_file(memory: Path) -> Path:
    (file,) = memory.glob("kernels-*.json")
    return file


def test_what_was_measured_is_read_by_others(memory, measured):
    product = Product(linear())
    product.rows |= {1, 12}
    choose_kernels([product])
    assert [rows for rows, *_ in measured] == [1, 12]
    found = json.loads(kernel_file(memory).read_text())
    assert set(found) == {"float32 32x48 1", "float32 32x48 12"}
    another = Product(linear())
    another.rows |= {1, 12}
    choose_kernels([another])
    assert len(measured) == 2, "measured again"
    chosen = {rows: getattr(kernel, "__name__", "linear") for rows, kernel in another.kernels.items()}
    assert chosen == {rows: found[f"float32 32x48 {rows}"] for rows in (1, 12)}


def test_a_target_names_its_kernels_as_they_are_remembered(kernels, tmp_path):
    kernels("onednn")
    target = Target(llava())
    target.expect([1, 8])
    found = target.kernels
    assert set(found.values()) == {"onednn"} and {key.split()[-1] for key in found} == {"1", "8"}
    assert found == json.loads(kernel_file(tmp_path / "onednn" / "vispec").read_text())
    assert Target(llava(), fast=False).kernels == {}


def test_kernels_stay_while_weights_do():
    target = Target(llava(attention_bias=True, mlp_bias=True))
    target.expect([1, 8])
    before = [dict(product.kernels) for product in target._products._made.values()]
    assert len(before) == 3 * 4 + 1 and all(set(kernels) == {1, 8} for kernels in before)
    SpecModel(target).baseline_generate(torch.arange(5, 17)[None], max_new_tokens=4)
    assert [product.kernels for product in target._products._made.values()] == before


def test_a_whole_model_is_measured_once(measured):
    vlm = llava()
    assert_exact(spec(vlm))
    assert measured and len(measured) == len(set(measured))
    before = len(measured)
    assert_exact(spec(vlm))
    assert_exact(spec(llava(seed=1)))
    assert len(measured) == before


@pytest.mark.parametrize("name", ["onednn", "mkl", "linear"])
def test_a_file_that_names_a_kernel_is_obeyed(name, memory, measured):
    if not products._has(name, torch.float32):
        pytest.skip(f"this PyTorch has no {name}")
    product = Product(linear())
    product.rows |= {12}
    choose_kernels([product])
    kernel_file(memory).write_text(json.dumps({"float32 32x48 12": name}))
    measured.clear()
    product = Product(linear())
    product.rows |= {12}
    choose_kernels([product])
    assert not measured
    assert {copy.split()[0] for copy in product.held} == {name} - {"linear"}
    assert_right(product, 12)


@pytest.mark.parametrize(
    "content",
    [b"{", b"[1, 2]", b"\xff\xfe", b"", b'{"float32 32x48 12": "unheard of"}', b'{"float32 32x48 12": ["onednn"]}'],
)
def test_a_broken_file_is_measured_anew_and_mended(content, memory, measured):
    product = Product(linear())
    product.rows |= {12}
    choose_kernels([product])
    kernel_file(memory).write_bytes(content)
    measured.clear()
    product = Product(linear())
    product.rows |= {12}
    choose_kernels([product])
    assert [rows for rows, *_ in measured] == [12]
    assert json.loads(kernel_file(memory).read_text())["float32 32x48 12"] in products.CANDIDATES[torch.float32]
    assert_right(product, 12)


@pytest.mark.parametrize("what", ["processor", "threads", "torch"])
def test_another_machine_has_a_file_of_its_own(what, memory, measured, monkeypatch):
    def choose():
        product = Product(linear())
        product.rows |= {12}
        choose_kernels([product])

    choose()
    if what == "processor":
        monkeypatch.setattr(products, "_processor", lambda: "another CPU")
    elif what == "threads":
        monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    else:
        monkeypatch.setattr(torch, "__version__", "99.0")
    measured.clear()
    choose()
    assert len(measured) == 1 and len(list(memory.glob("kernels-*.json"))) == 2


@pytest.mark.parametrize("what", ["a file", "no home"])
def test_a_folder_that_cannot_be_written_is_harmless(what, monkeypatch, tmp_path, measured):
    if what == "a file":
        (tmp_path / "taken").write_text("")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "taken"))
    else:
        monkeypatch.delenv("XDG_CACHE_HOME")

        def home(*_):
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr(Path, "home", home)
    for _ in range(2):
        product = Product(linear())
        product.rows |= {12}
        choose_kernels([product])
        assert_right(product, 12)
    assert len(measured) == 2
