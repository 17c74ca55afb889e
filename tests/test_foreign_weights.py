"""Checkpoints that hold more than tensors: read without running anything from them, whatever it is."""

import argparse
import builtins
import codecs
import copyreg
import enum
import io
import os
import pickle
import random
import resource
import struct
import sys
import types
import zipfile
from collections import Counter, OrderedDict, defaultdict
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from mutations import FOREIGN

from models import Encoder
from weights import Placeholder, WeightsError, load_encoder_weights, read_resnet, read_weights

FORMATS = pytest.mark.parametrize("modern", [True, False], ids=["zip", "legacy"])


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(0)
    return Encoder("tiny").export_state_dict()


def save(content, path, modern=True, **options):
    torch.save(content, path, _use_new_zipfile_serialization=modern, **options)
    return path


# ---- Files as other tools leave them ----


@pytest.fixture
def tool(monkeypatch):
    """A module with the kinds of classes that tools have, to be gone when the file is read."""
    module = types.ModuleType("sometool.hub")
    code = """
import enum
class HistoryBuffer:
    def __init__(self, values): self.values = values
    def __setstate__(self, state): raise RuntimeError("run")
class Config(dict):
    def __setitem__(self, key, value): raise RuntimeError("run")
class Phase(enum.Enum):
    TRAIN = "train"
class Bag(list):
    def extend(self, items): raise RuntimeError("run")
class Weight(__import__("torch").nn.Parameter):
    pass
"""
    exec(code, module.__dict__)
    for name in ("HistoryBuffer", "Config", "Phase", "Bag", "Weight"):
        getattr(module, name).__module__ = "sometool.hub"
    monkeypatch.setitem(sys.modules, "sometool", types.ModuleType("sometool"))
    monkeypatch.setitem(sys.modules, "sometool.hub", module)
    return module


def layouts(tool, state):
    """By the name of a tool: what its files hold, what stands before the names, what is left out."""
    under = {
        prefix: {prefix + name: value for name, value in state.items()} for prefix in ("backbone.", "model.")
    }
    history = {"train/loss": tool.HistoryBuffer(np.arange(5.0)), "lr": [np.float64(0.1)]}
    trunk = {f"_feature_blocks.{name}": value for name, value in state.items()}
    classy = {"base_model": {"model": {"trunk": trunk, "heads": {}}}, "losses": [np.float32(1)]}
    sgd = torch.optim.SGD([torch.zeros(3)], 0.1, momentum=0.9).state_dict()
    settings = argparse.Namespace(lr=0.1, out=Path("out"), phase=tool.Phase.TRAIN, seen={1, (2, 3)})
    fair = {"args": settings, "model": OrderedDict(under["model."]), "best": np.float64(3)}
    return {
        "mmengine": (
            {"meta": {"cfg": "x = 1", "seed": 3}, "message_hub": history, "state_dict": under["backbone."]},
            "backbone.",
            "meta, message_hub (sometool.hub.HistoryBuffer)",
        ),
        "lightning": (
            {
                "epoch": 3,
                "state_dict": under["model."],
                "hyper_parameters": tool.Config(lr=0.1),
                "optimizer_states": [sgd],
                "callbacks": {tool.Phase.TRAIN: defaultdict(list, a=[1]), "bag": tool.Bag([1, 2])},
            },
            "model.",
            "epoch, hyper_parameters (sometool.hub.Config), optimizer_states, callbacks (sometool.hub.Bag)",
        ),
        "vissl": (
            {"iteration": 7, "classy_state_dict": classy, "type": "consolidated"},
            "_feature_blocks.",
            "iteration, type",
        ),
        "fairseq": (fair, "model.", "args (argparse.Namespace), best (numpy._core.multiarray.scalar)"),
        "a subclass of Parameter": (
            {name: tool.Weight(v) if v.is_floating_point() else v for name, v in state.items()} | {"n": 1},
            "",
            "n",
        ),
    }


@FORMATS
@pytest.mark.parametrize("name", ["mmengine", "lightning", "vissl", "fairseq", "a subclass of Parameter"])
def test_checkpoints_of_other_tools_load_without_their_classes(
    tool, state, tmp_path, monkeypatch, name, modern
):
    content, prefix, rest = layouts(tool, state)[name]
    path = save(content, tmp_path / "x.pth", modern)
    monkeypatch.delitem(sys.modules, "sometool.hub")
    monkeypatch.delitem(sys.modules, "sometool")
    encoder = Encoder("tiny")
    report = load_encoder_weights(encoder, path)
    assert all(torch.equal(encoder.state_dict()[key], value) for key, value in state.items())
    under = f" under '{prefix}'" if prefix else ""
    assert str(report) == f"{path}: loaded {len(state)} tensors{under}, left out beside them {rest}"


@FORMATS
@pytest.mark.parametrize("protocol", [2, 4])
def test_what_is_plain_is_read_as_torch_reads_it(tmp_path, modern, protocol):
    torch.manual_seed(0)
    whole = torch.randn(5, 6)
    plain = {"a": [1, -(10**10), 2.5, None, True], "b": ("text", {"é": "\u2028"}), 3: {0.5: "x"}}
    types_ = [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool]
    tensors = {str(one): whole.to(one) for one in types_}
    tensors |= {
        "part": whole[1:3],
        "turned": whole.T,
        "same": whole,
        "number": torch.tensor(3),
        "none": whole[:0],
    }
    tensors |= {"parameter": torch.nn.Parameter(whole), "expanded": torch.zeros(1).expand(10**5, 10**5)}
    path = save({"plain": plain, "tensors": tensors}, tmp_path / "x.pth", modern, pickle_protocol=protocol)
    if not modern and protocol != 2:
        with pytest.raises(WeightsError, match="not a weights file"):
            read_weights(path)
        return
    content, wanted = read_weights(path), torch.load(path, weights_only=False)
    assert content["plain"] == wanted["plain"] == plain
    for name, value in wanted["tensors"].items():
        found = content["tensors"][name]
        assert (found.dtype, found.stride()) == (value.dtype, value.stride())
        assert name == "expanded" or torch.equal(found, value)
    assert content["tensors"]["part"].data_ptr() == content["tensors"]["same"].data_ptr() + 6 * 4


def test_a_whole_pickled_network_is_named(tmp_path):
    for content in (torch.nn.Linear(2, 2), {"model": torch.nn.Linear(2, 2)}):
        save(content, tmp_path / "x.pth")
        with pytest.raises(WeightsError, match="an object of torch.nn.modules.linear.Linear"):
            load_encoder_weights(Encoder("tiny"), tmp_path / "x.pth")


# ---- Hostile files ----


class Reduced:
    def __init__(self, *what):
        self.what = what

    def __reduce__(self):
        return self.what


class Owner:
    def __setstate__(self, state):
        os.mkdir("owned")


def owner():
    one = Owner()
    one.x = 1
    return one


MAKE = "__import__('os').mkdir('owned')"
OBJECTS = {
    "os.system": Reduced(os.system, ("mkdir owned",)),
    "builtins.eval": Reduced(builtins.eval, (MAKE,)),
    "builtins.exec": [{"deep": (Reduced(builtins.exec, (MAKE,)),)}],
    "__setstate__": owner(),
    "state of a function": Reduced(print, (), {"__defaults__": (1,)}),
    "items by a class": Reduced(list, (), None, iter([Reduced(os.mkdir, ("owned",))])),
    "getattr": Reduced(Reduced(getattr, (os, "mkdir")), ("owned",)),
    "codecs": Reduced(codecs.decode, (Reduced(eval, (MAKE,)), "utf-8")),
    "a key": {Reduced(os.mkdir, ("owned",)): 1},
    "a set": {Reduced(os.mkdir, ("owned",))},
    "torch.load": Reduced(torch.load, ("x.pth",)),
    "numpy": np.array([Reduced(os.mkdir, ("owned",))], dtype=object),
}


class ByName(pickle._Pickler):
    """Pickles modules, and what is to be called although it is an object, as torch.save does not."""

    def save(self, obj, save_persistent_id=True):
        if isinstance(obj, types.ModuleType):
            return self.write(b"cimportlib\nimport_module\n" + b"X\x02\0\0\0os\x85R")
        if isinstance(obj, Reduced) and len(obj.what) == 2:
            self.save(obj.what[0])
            self.save(obj.what[1])
            return self.write(pickle.REDUCE)
        return super().save(obj, save_persistent_id)


def pickled(content):
    file = io.BytesIO()
    ByName(file, 2).dump(content)
    return file.getvalue()


def hold(path, code, modern=True):
    """A file of torch.save with these instructions, and four numbers under the name "0"."""
    if not modern:
        head = b"".join(pickle.dumps(one, 2) for one in (0x1950A86A20F9469CFC6C, 1001, {}))
        path.write_bytes(head + code + pickle.dumps([], 2))
        return path
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", code)
        archive.writestr("x/byteorder", "little")
        archive.writestr("x/data/0", struct.pack("<4f", 1, 2, 3, 4))
    return path


@FORMATS
@pytest.mark.parametrize("name", OBJECTS)
def test_nothing_in_a_file_runs(tmp_path, monkeypatch, name, modern):
    monkeypatch.chdir(tmp_path)
    path = hold(tmp_path / "x.pth", pickled({"x": OBJECTS[name], "after": 1}), modern)
    content = read_weights(path)
    assert content["after"] == 1
    with pytest.raises(WeightsError, match="x.pth: holds no tensors") as error:
        load_encoder_weights(Encoder("tiny"), path)
    assert "\n" not in str(error.value)
    assert os.listdir() == ["x.pth"]


def test_such_files_would_run_something_if_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("os.system", "builtins.eval", "__setstate__", "getattr", "codecs", "a key", "a set"):
        with suppress(TypeError):  # after it has run
            pickle.loads(pickled({"x": OBJECTS[name]}))
        assert os.path.isdir("owned"), name
        os.rmdir("owned")


def tensor(
    offset=b"K\0", size=b"K\x04\x85", stride=b"K\x01\x85", count=b"K\x04", kind=b"FloatStorage", key=b"0"
):
    """The instructions for {"x": a tensor}."""
    storage = b"(X\7\0\0\0storagectorch\n" + kind + b"\nX" + struct.pack("<I", len(key)) + key
    storage += b"X\3\0\0\0cpu" + count + b"tQ"
    make = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + offset + size + stride + b"\x89}tR"
    return b"\x80\x02}X\1\0\0\0x" + make + b"s."


BIG = b"\x8a\x06" + (2**40).to_bytes(6, "little")
CODE = {  # instructions, and a part of what is said; None: they are read
    "a tensor": (tensor(), None),
    "a stride of 0": (tensor(size=BIG + b"\x85", stride=b"K\0\x85"), None),
    "a size beyond the numbers": (tensor(size=b"K\x05\x85"), "out of bounds"),
    "a huge size": (tensor(size=BIG + b"\x85"), "out of bounds"),
    "an offset beyond them": (tensor(offset=BIG), "out of bounds"),
    "a negative offset": (tensor(offset=b"J\xff\xff\xff\xff"), "x.pth: "),
    "a negative stride": (tensor(stride=b"J\xff\xff\xff\xff\x85"), "x.pth: "),
    "more numbers than there are": (tensor(count=BIG), "x.pth: "),
    "wider numbers than there are": (tensor(kind=b"DoubleStorage"), "x.pth: "),
    "all numbers": (tensor(count=b"J\xff\xff\xff\xff"), None),
    "numbers that are not there": (tensor(key=b"../../0"), "not a weights file, or damaged"),
    "numbers of no known kind": (tensor(kind=b"EvilStorage"), "x.pth: "),
    "a state for our function": (
        b"\x80\x02}X\1\0\0\0xctorch._utils\n_rebuild_tensor_v2\n}X\x0c\0\0\0__defaults__K\x01\x85sbs.",
        None,
    ),
    "a state for our function, in slots": (
        b"\x80\x02}X\1\0\0\0xctorch._utils\n_rebuild_tensor_v2\nN}X\x0c\0\0\0__defaults__K\x01\x85s\x86bs.",
        None,
    ),
    "items of our function": (b"\x80\x02}ctorch._utils\n_rebuild_tensor_v2\n(K\1K\2u0.", None),
    "an attribute by a dotted name": (b"\x80\x04}\x8c\1x\x8c\x05torch\x8c\x0dos.path.mkdir\x93)Rs.", None),
    "an old instance": (b"}S'x'\n(ios\nsystem\ns.", None),
    "an old object": (b"}S'x'\n(cos\nsystem\nS'mkdir owned'\nos.", None),
    "a new object with keywords": (b"\x80\x04}\x8c\1xcos\nmkdir\n\x8c\5owned\x85}\x92s.", None),
    "a class known by number": (b"\x80\x02}X\1\0\0\0x\x82\x01)Rs.", "not a weights file, or damaged"),
    "a place far away": (b"\x80\x02}r\xff\xff\xff\xff.", None),
    "text that is not there": (b"\x80\x04\x8d" + b"\xff" * 7 + b"\x7f" + b"x.", "x.pth: "),
    "bytes that are not there": (b"\x80\x05\x96" + b"\0" * 7 + b"\x10" + b"x.", "x.pth: "),
    "a name of two lines": (b"\x80\x04}\x8c\1x\x8c\x03a\nb\x8c\x03\x1b[2\x93s.", None),
    "a key of two lines": (b"\x80\x02}X\3\0\0\0a\nbK\1s.", None),
    "many lists": (b"\x80\x02}X\1\0\0\0x" + b"]" * 10**5 + b"a" * (10**5 - 1) + b"s.", None),
    "many dicts": (b"\x80\x02}" + b"K\1}" * 10**5 + b"s" * 10**5 + b".", None),
    "many tuples as a key": (b"\x80\x02}" + b")" + b"\x85" * 10**5 + b"K\1s.", None),
    "many tuples in a set": (b"\x80\x04}\x8c\1x\x8f()" + b"\x85" * 10**5 + b"\x90s.", None),
    "many tuples as a name": (b"\x80\x02)" + b"\x85" * 10**5 + b"Q.", "x.pth: "),
    "a dict of itself": (b"\x80\x02}q\0X\1\0\0\0xh\0s.", None),
    "2^60 lists": (b"\x80\x02}X\1\0\0\0x]" + b"2\x86" * 60 + b"s.", None),
    "dicts of one list": (
        b"\x80\x02}X\1\0\0\0x](" + b"".join(b"J" + struct.pack("<i", i) + b"N\x86" for i in range(30000))
        + b"eq\0\x85q\0010ccollections\nOrderedDict\nq\x020(" + b"h\2h\1R" * 3000 + b"ls.", None,
    ),
    "pairs in no list": (b"\x80\x02ccollections\nOrderedDict\n}\x85R.", "not a weights file, or damaged"),
    "a subclass of a subclass": (
        b"\x80\x02" + b"ctorch._tensor\n_rebuild_from_type_v2\n(" * 5000 + b"NN)Nt" + b"R." * 5000, "x.pth: "
    ),
}  # fmt: skip


@FORMATS
@pytest.mark.parametrize("name", CODE)
def test_instructions_out_of_the_ordinary(tmp_path, monkeypatch, name, modern):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(copyreg._inverted_registry, 1, ("os", "mkdir"))
    code, text = CODE[name]
    before, defaults = memory(), torch._utils._rebuild_tensor_v2.__defaults__
    path = hold(tmp_path / "x.pth", code, modern)
    if text is None and modern:
        assert isinstance(read_weights(path), dict)
    with pytest.raises(WeightsError) as error:  # without a ResNet in it
        load_encoder_weights(Encoder("tiny"), path)
    assert "\n" not in str(error.value) and str(error.value).isprintable()
    assert text is None or not modern or text in str(error.value)
    assert os.listdir() == ["x.pth"] and memory() - before < 2**30
    assert torch._utils._rebuild_tensor_v2.__defaults__ == defaults


@FORMATS
def test_more_instructions_than_a_checkpoint_has(tmp_path, monkeypatch, modern):
    monkeypatch.setattr("weights.MOST_INSTRUCTIONS", 1000)
    some, more = (b"\x80\x02}" + b"]0" * count + b"." for count in (400, 500))
    assert read_weights(hold(tmp_path / "x.pth", some, modern)) == {}
    with pytest.raises(WeightsError, match="of more than 1,000 instructions"):
        read_weights(hold(tmp_path / "x.pth", more, modern))


def test_what_stands_in_many_places_is_looked_at_once(tmp_path, state):
    """10^9 steps otherwise."""
    shared = [[] for _ in range(10**5)]
    content = {"state_dict": state} | {f"n{number}": [shared] for number in range(10**4)}
    *_, note = read_resnet(save({**content, "same": content}, tmp_path / "x.pth"))
    assert note == ", left out beside them n0, n1, n2, n3, n4, n5, ..."


def memory():
    """The most that this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# ---- Mutated files ----


class Kind(enum.Enum):
    ONE = 1


@FORMATS
def test_mutated_checkpoints_are_read_or_one_line(tmp_path, state, modern):
    """200 of each format; through a script: tests/test_corruption.py."""
    small = {name: value for name, value in state.items() if name.startswith("layer1.0")}
    beside = {
        "kind": Kind.ONE,
        "n": np.float64(3),
        "set": {1},
        "count": Counter(a=1),
        "history": [np.arange(3)],
    }
    sound = save({"state_dict": small, **beside}, tmp_path / "sound.pth", modern).read_bytes()
    (tmp_path / "other.txt").write_text("something else")
    path, before, read = tmp_path / "x.pth", memory(), 0
    for number in range(200):
        rng = random.Random(f"foreign {number}")
        mutations = FOREIGN if modern else FOREIGN[3:-1]
        path.write_bytes(sound)
        mutations[number % len(mutations)](rng, path, tmp_path)
        try:
            read += isinstance(read_weights(path), dict)
            read_resnet(path)
        except WeightsError as error:
            assert "\n" not in str(error) and len(str(error)) < 1200, number
        if path.is_dir():
            path.rmdir()
        path.unlink(missing_ok=True)
    assert 0 < read < 200 and memory() - before < 2**30


def test_placeholders_hold_nothing():
    one = Placeholder("os.system")
    with pytest.raises(TypeError):
        one("mkdir owned")
