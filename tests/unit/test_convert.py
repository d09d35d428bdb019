"""EDM's pickles are read without running what they hold.  The pickles are stand-ins, made here."""

import json
import os
import pickle
import sys
from collections import OrderedDict
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fewstep.convert import Reader, main, read_edm


class Persistent(nn.Module):
    """Pickled as EDM's are: by the maker of another program, with source, class and state."""

    def __reduce__(self):
        state = {**self.__dict__, "_init_args": (), "_init_kwargs": self.kwargs}
        source = f"open({os.environ['RAN']!r}, 'w').close()"
        meta = {"type": "class", "version": 6, "module_src": source, "class_name": self.label, "state": state}
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (meta,)


class Layer(Persistent):
    label, kwargs = "Conv2d", {}

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 2))
        self.bias = None
        self.register_buffer("resample_filter", torch.ones(1, 1, 2, 2))
        self.register_buffer("scratch", torch.ones(2), persistent=False)


class Network(Persistent):
    label, kwargs = "EDMPrecond", {"img_resolution": 32, "sigma_data": 0.5, "model_type": "SongUNet", "widths": [2]}

    def __init__(self):
        super().__init__()
        self.enc = nn.ModuleDict({"32x32_conv": Layer(), "32x32_block0": Layer()})
        self.scale = nn.Parameter(torch.randn(4).half())
        self.tied = self.scale  # one tensor under two names


@pytest.fixture
def maker(monkeypatch, tmp_path):
    """The other program's module, which only pickling needs; RAN is where its code would leave a file."""

    def _reconstruct_persistent_obj(meta):
        raise AssertionError("its loader was called")

    module = ModuleType("torch_utils.persistence")
    _reconstruct_persistent_obj.__module__ = module.__name__
    _reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"
    module._reconstruct_persistent_obj = _reconstruct_persistent_obj
    monkeypatch.setitem(sys.modules, "torch_utils", ModuleType("torch_utils"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setenv("RAN", str(tmp_path / "ran"))
    return tmp_path


@pytest.fixture
def file(maker):
    path = maker / "edm.pkl"
    torch.manual_seed(0)
    path.write_bytes(pickle.dumps({"ema": Network(), "loss_fn": OrderedDict(sigma=1)}))
    return path


class Hostile:
    """What a pickle can be."""

    def __init__(self, what):
        self.what = what

    def __reduce__(self):
        return self.what


def test_tensors_and_arguments_are_those_of_the_network(file):
    torch.manual_seed(0)
    wanted, (found, config) = Network().state_dict(), read_edm(file)
    assert set(found) == set(wanted) and "enc.32x32_conv.resample_filter" in found
    assert all(torch.equal(found[name], wanted[name]) and found[name].dtype == wanted[name].dtype for name in wanted)
    assert config == {"class": "EDMPrecond", "arguments": Network.kwargs}


def test_command_writes_safetensors_in_a_process_of_its_own(file, maker, capfd):
    assert main(["edm", str(file), str(maker / "out"), "--unpickle"]) == 0
    assert "in a process of its own" in capfd.readouterr().err
    assert load_file(maker / "out" / "model.safetensors")["scale"].dtype == torch.float16
    assert json.loads((maker / "out" / "config.json").read_text())["class"] == "EDMPrecond"
    assert not (maker / "ran").exists()


def test_a_pickle_is_read_only_when_asked_for(file, maker, capfd):
    assert main(["edm", str(file), str(maker / "out")]) == 1
    assert "give --unpickle" in capfd.readouterr().err and not (maker / "out").exists()


def test_dictionaries_of_the_other_programs_own_kind_are_read(maker, monkeypatch):
    """As its EasyDict, which here is an inert object."""

    class EasyDict(dict):
        pass

    EasyDict.__module__, EasyDict.__qualname__ = "torch_utils.persistence", "EasyDict"
    monkeypatch.setattr(sys.modules["torch_utils.persistence"], "EasyDict", EasyDict, raising=False)
    monkeypatch.setattr(Network, "kwargs", EasyDict(sigma_data=0.5))
    (maker / "easy.pkl").write_bytes(pickle.dumps(EasyDict(ema=Network())))
    assert read_edm(maker / "easy.pkl")[1]["arguments"] == {"sigma_data": 0.5}


@pytest.mark.parametrize("inner", [False, True], ids=["outside", "in a storage"])
def test_what_it_would_call_is_not_called(maker, inner):
    """Fails if a name of the pickle is imported, or torch's own loader of storages is."""
    call = Hostile((os.mkdir, (str(maker / "ran"),)))
    if inner:
        call = Hostile((torch.storage._load_from_bytes, (pickle.dumps(call, 2),)))
    path = maker / "hostile.pkl"
    path.write_bytes(pickle.dumps({"ema": call}))
    with pytest.raises(ValueError, match=r"hostile.pkl (holds no weights|is no pickle of EDM)"):
        read_edm(path)
    assert not (maker / "ran").exists()


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04 a zip", pickle.dumps([1, 2]), pickle.dumps({"net": 1})], ids=len)
def test_other_files_are_refused(tmp_path, data):
    path = tmp_path / "other.pkl"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"is no pickle of EDM|holds no network 'ema'; it holds (list|net)"):
        read_edm(path)


def test_nothing_is_imported_by_name(maker):
    name = Reader(open(__file__, "rb")).find_class("os", "system")  # noqa: SIM115
    assert name is not os.system and name("true").args == ("true",)
