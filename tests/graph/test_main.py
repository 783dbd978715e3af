"""`python -m torchbp.graph`: what it reads, what it writes, and what it says of a mistake."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from torchbp.graph.__main__ import main

NET = """
import torch
from torch import nn

def f(x, y, z):
    q = x + y
    return q * z

def loss(w, scores, target):
    return nn.functional.cross_entropy(scores @ w, target)

def broken(x):
    raise RuntimeError("this function is broken")

def keyword(x, *, scale):
    return x * scale

net = nn.Sequential(nn.Linear(3, 4), nn.Tanh())

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 1)
    def forward(self, x):
        return self.layer(x)

class Sized(nn.Module):
    def __init__(self, size):
        super().__init__()

number = 3
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a file of functions, in which the command is run."""
    (tmp_path / "own_net.py").write_text(NET)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


@pytest.fixture(autouse=True)
def forget() -> object:
    yield
    sys.modules.pop("own_net", None)


def gradients(*arguments: str) -> dict[str, Any]:
    """What reaches each input and parameter, as the command writes it."""
    assert main([*arguments, "-o", "ledger.json"]) == 0
    nodes = json.loads(Path("ledger.json").read_text())["nodes"]
    return {node["name"]: node["upstreams"][0] for node in nodes if node["kind"] != "gate"}


@pytest.mark.parametrize("place", ["own_net.py", "own_net"])
def test_the_lectures_circuit_by_file_and_by_module(
    place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("fast_sugiyama", reason="lays graphs out")
    assert main([f"{place}:f", "-2.0", "5.", "-.4e1", "--flat", "--table"]) == 0
    page = Path("f.html").read_text()
    assert page.startswith("<!doctype html>")
    out = capsys.readouterr().out
    assert "grad_z = grad_L * q" in out
    assert "swap multiplier" in out
    assert "f.html: Ledger(2 gates, 3 inputs and parameters)" in out
    names = {"x": -4.0, "y": -4.0, "z": 3.0}
    found = gradients(f"{place}:f", "-2.0", "5.", "-.4e1")
    assert {name: held["values"] for name, held in found.items()} == names


def test_runs_as_a_command(folder: Path) -> None:
    pytest.importorskip("fast_sugiyama", reason="lays graphs out")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-m", "torchbp.graph", "own_net:net", "2x3", "-o", "net.svg"],
        cwd=folder, env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert (folder / "net.svg").read_text().startswith("<svg")


def test_shapes_dtypes_and_seed() -> None:
    arguments = "own_net.py:loss", "3x5:float64", "4x3:float64", "4:int64:5"
    first, again = gradients(*arguments), gradients(*arguments)
    assert first == again
    assert first != gradients(*arguments, "--seed", "1")
    shapes = {name: (held["shape"], held["dtype"]) for name, held in first.items() if held}
    assert shapes == {"w": ([3, 5], "float64"), "scores": ([4, 3], "float64")}


def test_numbers_are_as_torch_reads_them() -> None:
    found = gradients("own_net.py:f", "[[1.0, -2], [3, 4]]", "[1, 2]", "0.5:float64")
    assert found["y"] is None  # integers
    assert (found["x"]["dtype"], found["x"]["values"]) == ("float32", [[0.5, 0.5], [0.5, 0.5]])
    assert (found["z"]["dtype"], found["z"]["values"]) == ("float64", 12.0)


def test_a_class_of_modules_is_made_with_the_seed() -> None:
    torch.manual_seed(0)
    for out in (4, 1):
        torch.nn.Linear(3, out)  # as the file makes them
    x = torch.randn(2, 3)
    found = gradients("own_net.py:Net", "2x3")
    # dL/dweight = sum of x, upstream ones: four decimals of it or more are written
    values = torch.tensor(found["layer.weight"]["values"])
    torch.testing.assert_close(values, x.sum(0)[None], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["list", "dict", "tensor", "safetensors"])
def test_inputs_from_a_file(kind: str) -> None:
    x, y, z = torch.tensor(-2.0), torch.tensor(5.0), torch.tensor(-4.0)
    name, file, expected = "own_net.py:f", "inputs.pt", {"x": -4.0, "y": -4.0, "z": 3.0}
    if kind == "list":
        torch.save([x, y, z], file)
    elif kind == "dict":
        torch.save({"z": z, "y": y, "x": x}, file)  # by name, in any order
    elif kind == "tensor":
        name, expected = "torch:sigmoid", {"x": 0.25}
        torch.save(torch.tensor(0.0), file)
    else:
        file = "inputs.safetensors"
        save_file({"z": z, "y": y, "x": x}, file)
    found = gradients(name, "--inputs", file)
    assert {name: held["values"] for name, held in found.items()} == expected


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return os.mkdir, ("was_run",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("plain", [False, True])
def test_a_file_of_tensors_runs_no_code(plain: bool, capsys: pytest.CaptureFixture[str]) -> None:
    if plain:
        Path("evil.pt").write_bytes(pickle.dumps([Evil()]))
    else:
        torch.save([Evil()], "evil.pt")
    with pytest.raises(SystemExit) as stop:
        main(["own_net.py:f", "--inputs", "evil.pt"])
    assert stop.value.code == 2
    assert "evil.pt wants tensors alone" in capsys.readouterr().err
    assert not Path("was_run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["own_net.py"], "wants a colon between the two, got own_net.py"),
        (["own_net.py:"], "wants a colon"),
        (["nowhere.py:f"], "there is no file nowhere.py"),
        (["nowhere:f"], "there is no module nowhere"),
        (["own_net.nowhere:f"], "there is no module own_net.nowhere"),
        (["own_net.py:g"], "own_net.py has no g"),
        (["own_net.py:number"], "number is int"),
        (["own_net.py:Sized", "2"], "Sized is a class of modules and wants arguments"),
        (["own_net.py:f", "1.0"], "f wants other arguments than 1: missing a required argument"),
        (["own_net.py:net", "2", "3"], "Sequential wants other arguments than 2"),
        (["own_net.py:keyword", "2"], "missing a required argument: 'scale'"),
        (["own_net.py:f", "2x", "1", "1"], "INPUT 2x: wants a shape"),
        (["own_net.py:f", "2:float33", "1", "1"], "there is no dtype float33"),
        (["own_net.py:f", "2:randn", "1", "1"], "there is no dtype randn"),
        (["own_net.py:f", "2:float32:3", "1", "1"], "only integers have a bound"),
        (["own_net.py:f", "2:int64:0", "1", "1"], "wants integers below 1 or more"),
        (["own_net.py:f", "[print()]", "1", "1"], "INPUT [print()]: wants numbers"),
        (["own_net.py:f", "['a']", "1", "1"], "wants numbers"),
        (["own_net.py:f", ".", "1", "1"], "wants numbers"),
        (["own_net.py:f", "[[1,2],[3]]", "1", "1"], "wants numbers"),
        (["own_net.py:f", "99999x99999", "1", "1"], "are more than can be traced"),
        (["own_net.py:f", "1.0", "--inputs", "a.pt"], "give one of them"),
        (["own_net.py:f", "--inputs", "a.pt"], "there is no file a.pt"),
        (["own_net.py:f", "--inputs", "own_net.py"], "own_net.py wants tensors alone"),
        (["own_net.py:f", "1", "1", "1", "-o", "f.png"], "ends in .html, .svg or .json, got f.png"),
        (["own_net.py:f", "1", "1", "1", "-o", "no/f.svg"], "there is no folder no"),
        (["own_net.py:f", "2:int64", "2:int64", "2:int64"], "trace: fn wants an output that"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(Path().glob("*.html"))


def test_names_in_a_file_that_are_no_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"a": torch.ones(2), "b": torch.ones(2), "c": torch.ones(2)}, "inputs.pt")
    with pytest.raises(SystemExit):
        main(["own_net.py:f", "--inputs", "inputs.pt"])
    assert "has a, b, c, and the arguments of f are x, y, z" in capsys.readouterr().err


def test_an_error_of_the_function_itself_is_shown_whole() -> None:
    with pytest.raises(RuntimeError, match="this function is broken"):
        main(["own_net.py:broken", "2"])


def test_what_a_module_cannot_import_is_said(folder: Path) -> None:
    (folder / "needy.py").write_text("import not_installed_anywhere\n")
    for place in ("needy", "needy.py"):
        with pytest.raises(SystemExit) as stop:
            main([f"{place}:f"])
        assert stop.value.code == 2
