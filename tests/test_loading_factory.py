"""MODULE:FACTORY: the user's code builds the module, the checkpoint fills it."""

import sys
import textwrap

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mpocompress.errors import LoadError
from mpocompress.loading import load_source
from mpocompress.loading.factory import fill_module, project_on_path


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A current directory; `project(name, code)` writes a module into it."""
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    path = list(sys.path)

    def write(name, code):
        (tmp_path / f"{name}.py").write_text("import torch\nfrom torch import nn\n" + code)

    yield write
    assert sys.path == path
    for name in set(sys.modules) - before:
        del sys.modules[name]


NET = textwrap.dedent(
    """
    class Net(nn.Module):
        def __init__(self, width=5):
            super().__init__()
            self.fc1 = nn.Linear(3, width)
            self.fc2 = nn.Linear(width, 2)

        def forward(self, x):
            return self.fc2(self.fc1(x).relu())

    def build():
        return Net()

    ready = Net()

    class Nested:
        build = staticmethod(build)
    """
)


def net_state(width=5):
    torch.manual_seed(0)
    return nn.ModuleDict({"fc1": nn.Linear(3, width), "fc2": nn.Linear(width, 2)}).state_dict()


@pytest.mark.parametrize("name", ["Net", "build", "ready", "Nested.build"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_class_function_and_instance(name, suffix, project):
    project("factory_kinds", NET)
    state = net_state()
    (torch.save if suffix == ".pt" else save_file)(state, f"net{suffix}")
    source = load_source(f"net{suffix}", factory=f"factory_kinds:{name}")
    assert source.kind == "module"
    assert source.notes == ()
    assert not source.module.training
    for key, value in source.module.state_dict().items():
        assert torch.equal(value, state[key])


def test_whole_module_fills_a_factory_too(project):
    project("factory_whole", NET)
    module = nn.ModuleDict({"fc1": nn.Linear(3, 5), "fc2": nn.Linear(5, 2)})
    torch.save(module, "net.pt")
    source = load_source("net.pt", factory="factory_whole:build")
    assert torch.equal(source.module.fc1.weight, module["fc1"].weight)


def test_filling_makes_no_copy_and_keeps_what_the_module_says():
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.LSTM(2, 2))
    module[0].bias.requires_grad_(False)
    state = {name: value.clone() for name, value in module.state_dict().items()}
    notes = fill_module(module, state, spec="m:f", place="net.pt")
    assert notes == ()
    assert module[0].weight.requires_grad
    assert not module[0].bias.requires_grad
    for name, value in module.state_dict().items():
        assert value.data_ptr() == state[name].data_ptr()
    module[2](torch.ones(1, 2))


def test_dtype_of_the_checkpoint_wins():
    module = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    state = {k: v.to(torch.bfloat16) for k, v in module.state_dict().items()}
    (note,) = fill_module(module, state, spec="m:f", place="net.pt")
    assert note == "4 tensors keep the checkpoint's bfloat16, where the factory builds float32"
    assert module[0].weight.dtype == torch.bfloat16


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight


@pytest.mark.parametrize("names", [("embed", "head"), ("embed",), ("head",)])
def test_ties_survive(names):
    module = Tied()
    weight = torch.randn(5, 3)
    fill_module(module, {f"{n}.weight": weight for n in names}, spec="m:f", place="net.pt")
    assert module.head.weight is module.embed.weight
    assert torch.equal(module.head.weight, weight)


def test_tie_that_the_checkpoint_does_not_have():
    state = {"embed.weight": torch.zeros(5, 3), "head.weight": torch.ones(5, 3)}
    with pytest.raises(LoadError, match=r"'embed\.weight' and 'head\.weight' are one tied"):
        fill_module(Tied(), state, spec="m:f", place="net.pt")


def test_module_on_the_meta_device_is_filled():
    with torch.device("meta"):
        module = nn.Linear(3, 2)
    state = nn.Linear(3, 2).state_dict()
    fill_module(module, state, spec="m:f", place="net.pt")
    assert torch.equal(module.weight, state["weight"])
    with torch.device("meta"):
        module.register_buffer("scale", torch.ones(1), persistent=False)
    with pytest.raises(LoadError, match="'scale' is on the meta device"):
        fill_module(module, state, spec="m:f", place="net.pt")


def test_missing_and_unexpected_names_with_near_ones(project):
    project("factory_names", NET)
    state = net_state()
    state["fc_1.weight"] = state.pop("fc1.weight")
    torch.save(state, "net.pt")
    with pytest.raises(LoadError) as caught:
        load_source("net.pt", factory="factory_names:build")
    message = str(caught.value)
    assert "1 of 4 names are missing from the checkpoint: 'fc1.weight'" in message
    assert "Near names: fc_1.weight" in message
    assert "1 names are unknown to the module: 'fc_1.weight'" in message


def test_names_only_in_the_checkpoint():
    state = {**nn.Linear(3, 2).state_dict(), "extra": torch.ones(1)}
    with pytest.raises(LoadError, match=r"unknown to the module: 'extra'.*leave out a part"):
        fill_module(nn.Linear(3, 2), state, spec="m:f", place="net.pt")


def test_other_shapes(project):
    project("factory_shapes", NET)
    torch.save(net_state(width=7), "net.pt")
    message = (
        r"3 of 4 tensors have another shape.*'fc1\.weight' is \(7, 3\) in the checkpoint and "
        r"\(5, 3\) in the module"
    )
    with pytest.raises(LoadError, match=message):
        load_source("net.pt", factory="factory_shapes:build")


def test_other_kinds_of_numbers():
    state = {"weight": torch.ones(2, 3, dtype=torch.int8), "bias": torch.ones(2)}
    with pytest.raises(LoadError, match=r"'weight' holds int8 numbers, .* expects float32"):
        fill_module(nn.Linear(3, 2), state, spec="m:f", place="net.pt")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("build", "not of the form MODULE:NAME"),
        ("a:b:c", "not of the form MODULE:NAME"),
        (":build", "not of the form MODULE:NAME"),
        ("nets/train.py:build", r"as in 'nets\.train:build'"),
        ("no_such_module_at_all:build", "no module 'no_such_module_at_all'"),
        ("factory_err:build", r"no module 'factory_err'.*Near names: factory_errors"),
        ("factory_errors:biuld", r"has no 'biuld'.*Near names: build"),
        ("factory_errors:number", "is an object of type int; needed is a function or class"),
        ("factory_errors:fails", "raised ZeroDivisionError: division by zero"),
        ("factory_errors:needs_argument", "raised TypeError: .*width"),
        ("factory_errors:leaves", "raised SystemExit"),
        (
            "factory_errors:number_maker",
            "returned an object of type int; needed is a torch.nn.Module",
        ),
    ],
)
def test_factory_errors(spec, message, project):
    project(
        "factory_errors",
        NET + "number = 3\n"
        "def fails(): return 1 / 0\n"
        "def needs_argument(width): return Net(width)\n"
        "def leaves(): raise SystemExit(1)\n"
        "def number_maker(): return 3\n",
    )
    torch.save(net_state(), "net.pt")
    with pytest.raises(LoadError, match=message):
        load_source("net.pt", factory=spec)


@pytest.mark.parametrize(
    ("code", "message", "cause"),
    [
        ("import not_installed_package\n", "needs the module 'not_installed_package'", ImportError),
        ("1 / 0\n", "importing broken_module raised ZeroDivisionError", ZeroDivisionError),
        ("def f(:\n", "importing broken_module raised SyntaxError", SyntaxError),
    ],
)
def test_module_that_cannot_be_imported(code, message, cause, project):
    project("broken_module", code)
    torch.save(net_state(), "net.pt")
    with pytest.raises(LoadError, match=message) as caught:
        load_source("net.pt", factory="broken_module:build")
    assert isinstance(caught.value.__cause__, cause)


def test_cause_is_chained(project):
    project("factory_cause", "def build(): return 1 / 0\n")
    torch.save(net_state(), "net.pt")
    with pytest.raises(LoadError) as caught:
        load_source("net.pt", factory="factory_cause:build")
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_trusted_pickle_finds_code_in_the_current_directory(project):
    project("trusted_code", NET)
    with project_on_path():
        from trusted_code import Net
    torch.save(Net(), "net.pt")
    del sys.modules["trusted_code"]
    source = load_source("net.pt", trust_pickle=True)
    assert type(source.module).__name__ == "Net"
