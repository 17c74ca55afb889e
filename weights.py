"""Weights as files: ours and other people's, read and recognised without running anything from them.

    weights_file, initial_weights    the file that a name in a setting stands for
    read_resnet                      the ResNet in a file, whatever else the file holds
    read_weights                     all of a checkpoint
    is_sound, fits                   whether what was read can be used
    load_encoder_weights             into an encoder, from our own files and most published checkpoints
    architecture_of                  the architecture that a file of weights shows

Copy this file together with losses.py and models.py.
"""

import io
import pickle
import re
import zipfile
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType

import torch
from torch import Tensor
from torchvision.models import resnet as published

from losses import IterNorm, Whitening, ZCAWhitening, inverse_sqrt
from models import ARCHITECTURES, LAYERS, Encoder, fold_whitening


class WeightsError(ValueError):
    """A weights file that cannot be used; the message is one line that names it."""


# ---- Which file ----------------------------------------------------------------------------------


def weights_file(name: str | Path) -> Path:
    """The file that a name of weights stands for: of a run's folder its encoder.pth; a path may begin with ~
    or with "torchvision:".

    Raises:
        WeightsError: a folder without an encoder; the message says what is there.
    """
    path = Path(str(name).removeprefix("torchvision:"))
    with suppress(RuntimeError):  # no such user
        path = path.expanduser()
    file = path / "encoder.pth" if path.is_dir() else path
    if file.exists() or not file.parent.is_dir():
        return file
    weights = sorted(one.name for one in file.parent.iterdir() if one.suffix in (".pth", ".pt", ".ckpt"))
    there = f"there are {', '.join(weights[:5])}" if weights else "there are no weights in its folder"
    if "checkpoint.pth" in weights:
        there += ", so that run is not finished"
    found = "no such file" if file == path else "a folder without encoder.pth"
    raise WeightsError(f"{path}: {found}; {there}")


def initial_weights(name: str) -> Path | None:
    """The file that a setting of weights names, as `weights_file` takes it; None for "random"."""
    return None if name == "random" else weights_file(name)


# ---- The ResNet in it ----------------------------------------------------------------------------


MARK = "layer1.0.conv1.weight"  # every ResNet checkpoint has it, whatever stands before it
FIRST = ".0.conv1.weight"  # of the first block of a layer
NUMBERED = re.compile(r"(?:layer)?(\d+)\.")  # a part of nn.Sequential; the stem may be layer0
WRAPPERS = re.compile(r"\.(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.)")
FAMILIES = {  # of other networks, and what names of their weights hold in the usual libraries
    "a U-Net of nnU-Net": r"stages\.\d+\.\d+\.convs\.|conv_blocks_context\.|decoder\.seg_layers\.",
    "a Swin transformer": r"relative_position_bias_table|\.cpb_mlp\.|swinViT\.",
    "a vision transformer (ViT)": r"\b(cls_token|class_token|pos_embed|pos_embedding|position_embeddings)$|"
    r"\.attn\.qkv\.|visual\.transformer\.",
    "a ConvNeXt": r"\.dwconv\.|stages\.\d+\.blocks\.\d+\.conv_dw|layer_scale|downsample_layers\.",
    "a DenseNet": r"denseblock\d|denselayer\d",
    "an EfficientNet or a MobileNet": r"_depthwise_conv|\bblocks\.\d+\.\d+\.(conv_pw|conv_dw|se)\b|"
    r"features\.\d+\.(\d+\.block\.\d+\.\d|conv\.\d|block\.\d+\.\d)",
    "a ResNet under Detectron2's names": r"\bres[2-5]\.0\.conv1\.",
    "a ResNet under the names of Hugging Face": r"encoder\.stages\.0\.layers\.0\.layer\.",
    "a U-Net": r"double_conv|\b(down|up)_?\d\.|upcat_\d|\.conv\.unit\d|submodule\.1\.",
    "a VGG or an AlexNet": r"\bfeatures\.\d+\.weight$",
}
OURS = {  # what of this project a file is that holds these two
    "a model of eval_seg.py": ("about", "state"),
    "a checkpoint of train_moco.py": ("model", "running_statistics"),
    "a checkpoint of eval_seg.py": ("trained", "encoder_sha256"),
}
NUMBERS = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64)
FOLLOWERS = (
    "encoder_k.",
    "momentum",
    "teacher",
    "target",
    "ema",
    "key.",
)  # copies that follow the trained one


def read_resnet(path: Path) -> tuple[dict[str, Tensor], str, list[str], str]:
    """The ResNet in a file, sound and of our kind: its state dict, what stands before its names in the file,
    the names of all tensors there (torchvision's where it is theirs), and what to say of the file."""
    content = read_weights(path)
    kind = next((kind for kind, keys in OURS.items() if set(keys) <= content.keys()), "")
    found = find_tensors(content)
    names = torchvisions_names(found)
    tensors = {names[name]: value for name, value in found.items() if isinstance(value, Tensor)}
    prefixes = [name.removesuffix(MARK) for name in tensors if name.endswith(MARK)]
    prefixes.sort(key=lambda prefix: any(word in prefix for word in FOLLOWERS))
    if not prefixes:
        raise WeightsError(f"{path}: holds {kind or other_network(content)}, not the weights of a ResNet")
    prefix = prefixes[0]
    own = {name.removeprefix(prefix): v for name, v in tensors.items() if name.startswith(prefix)}
    if any(name.startswith(("stem.", "conv1.0.")) for name in own):
        other = "a deep stem (ResNetV1c or -D), or one of other parts than a convolution and a norm"
        raise WeightsError(f"{path}: has {other}; only the 7x7 stem can be loaded")
    if unsound := [name for name, value in own.items() if not is_sound(value)]:
        raise WeightsError(f"{path}: {unsound[0]} is not a tensor of finite numbers")
    if negative := [name for name, value in own.items() if is_negative(name, value)]:
        raise WeightsError(f"{path}: damaged, {negative[0]} is negative")
    if own[MARK].dim() == 5:
        raise WeightsError(f"{path}: holds a ResNet of 3D convolutions; ours see slices, in 2D")
    kernel = tuple(own.get("conv1.weight", torch.zeros(0, 0, 7, 7)).shape[2:])
    if len(kernel) == 2 and kernel != (7, 7):
        size = f"{kernel[0]} x {kernel[1]}"
        raise WeightsError(f"{path}: its first convolution is {size}; only the 7x7 stem can be loaded")
    note = left_out(content, found) + (f", from {kind}" if kind else "")
    return own, prefix, list(tensors), note


def find_tensors(content: dict) -> dict:
    """The outermost dict with a name of a ResNet's weights in it, else an empty one."""
    dicts = (part for part in parts_of(content) if isinstance(part, dict))
    marked = (one for one in dicts if any(name.endswith(MARK) for name in torchvisions_names(one).values()))
    return next(marked, {})


def torchvisions_names(names) -> dict[str, str]:
    """{name in a file: what torchvision calls it}, after whatever stands before a ResNet's own names.

    Names of wrappers inside are left out (DataParallel's `module`, torch.compile's `_orig_mod`). The parts
    of an nn.Sequential(*resnet.children()) are numbered: the first that holds blocks is layer1, what follows
    are the other layers, and before it stand a convolution and a norm.
    """
    found, taken, firsts = {}, set(), {}
    for name in names:
        short = WRAPPERS.sub("", str(name))
        found[name] = str(name) if short in taken else short
        taken.add(short)
        if short.endswith(FIRST) and (layer := re.search(r"(?:layer)?(\d+)$", short.removesuffix(FIRST))):
            root = short[: layer.start()]
            firsts[root] = min(int(layer[1]), firsts.get(root, int(layer[1])))
    numbered = {root: defaultdict(list) for root in firsts}  # {root: {number: [(name, rest of it)]}}
    for name, short in found.items():
        for part in NUMBERED.finditer(short):
            if (root := short[: part.start()]) in firsts:
                numbered[root][int(part[1])].append((name, short[part.end() :]))
    for root, parts in numbered.items():
        before = [name for number in sorted(parts) if number < firsts[root] for name, _ in parts[number]]
        places = {name: found[name].rpartition(".") for name in before}
        stem = list(dict.fromkeys(place for place, _, _ in places.values()))
        if not stem:  # it has torchvision's names
            continue
        called = ["conv1", "bn1"] if len(stem) == 2 else [f"stem.{i}" for i in range(len(stem))]
        for name, (place, _, own) in places.items():
            found[name] = f"{root}{called[stem.index(place)]}.{own}"
        layers = [number for number in sorted(parts) if number >= firsts[root]]
        for i, number in enumerate(layers[:4], 1):
            for name, rest in parts[number]:
                found[name] = f"{root}layer{i}.{rest}"
    return found


def other_network(content: dict) -> str:
    """What a file without a ResNet holds, as far as the names in it tell."""
    dicts = (part for part in parts_of(content) if isinstance(part, dict))
    names = [str(name) for one in dicts for name, value in one.items() if isinstance(value, Tensor)]
    for family, pattern in FAMILIES.items():
        if known := next((name for name in names if re.search(pattern, name)), None):
            return f"{family} ({known})"
    if names:
        return f"tensors called {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
    found = first_class(content)
    return f"no tensors, but an object of {found}" if found else "no tensors"


def left_out(content: dict, tensors: dict) -> str:
    """What to say of a checkpoint's entries that are not, and do not hold, the dict `tensors`."""
    used = holders_of(tensors, content)
    names = [
        name
        for name, value in content.items()
        if id(value) not in used and not (content is tensors and isinstance(value, Tensor))
    ]
    classes = [first_class(content[name]) for name in names[:6]]
    shown = [f"{name} ({found})" if found else str(name) for name, found in zip(names, classes)]
    more = ", ..." if len(names) > 6 else ""
    return f", left out beside them {', '.join(shown)}{more}" if names else ""


def holders_of(wanted: dict, content: dict) -> set[int]:
    """The ids of a part of a checkpoint and of all parts that hold it."""
    above = defaultdict(list)  # id of a part: those of the parts that it stands in
    for part in parts_of(content):
        for one in inside(part):
            above[id(one)].append(id(part))
    waiting, found = [id(wanted)], set()
    while waiting:
        if (one := waiting.pop()) not in found:
            found.add(one)
            waiting += above[one]
    return found


def first_class(content) -> str | None:
    """The name of one that stands in a checkpoint as a Placeholder; None if it is plain."""
    return next((part.name for part in parts_of(content) if isinstance(part, Placeholder)), None)


def parts_of(content):
    """A value and, if it is a dict, list or tuple, all in it, outer ones first; each of these comes once,
    however deep it lies and however often it stands in others."""
    waiting, opened = [content], set()
    while waiting:
        part = waiting.pop()
        if id(part) in opened:
            continue
        yield part
        if isinstance(part, dict | list | tuple):
            opened.add(id(part))
            waiting.extend(reversed(inside(part)))


def inside(part) -> list:
    """The values of a dict, list or tuple; none of anything else."""
    if isinstance(part, dict):
        return [*part.values()]
    return [*part] if isinstance(part, list | tuple) else []


# ---- A checkpoint's content ----------------------------------------------------------------------


def read_weights(path: str | Path) -> dict:
    """A checkpoint's content, on the CPU, read without running anything from it.

    Tensors, numbers, text, lists, tuples and dicts are as they were saved; every object of another class is a
    Placeholder, those of numpy and of Python itself included.

    Raises:
        WeightsError: no file of torch.save, damaged, or one of anything but a dict.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path}: no such file")
    try:
        check_intact(path)
        content = read_archive(path) if zipfile.is_zipfile(path) else read_legacy(path)
    except Exception as e:  # zipfile, pickle and torch raise many kinds on damaged files
        if other := other_format(path):
            raise WeightsError(f"{path}: {other}") from None
        if isinstance(e, pickle.UnpicklingError | LookupError | EOFError):
            raise WeightsError(f"{path}: not a weights file, or damaged") from None
        reason = (str(e).strip() or type(e).__name__).splitlines()[0][:200]
        raise WeightsError(f"{path}: cannot be read as weights ({reason})") from None
    if not isinstance(content, dict):
        found = f"an object of {content.name}" if isinstance(content, Placeholder) else type(content).__name__
        raise WeightsError(f"{path}: holds {found}, not a state dict")
    return content


def read_archive(path: Path):
    """What torch.save wrote: a zip file of a pickle and, as files beside it, the numbers of all tensors."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        folder = names[0].split("/")[0] if names else ""
        if f"{folder}/data.pkl" not in names:
            raise pickle.UnpicklingError("an archive of something else")
        if f"{folder}/byteorder" in names and archive.read(f"{folder}/byteorder") != b"little":
            raise ValueError("its numbers are big-endian")
        buffers = {}

        def storage(identity):
            dtype, key, count, _ = parse_storage(identity)
            if isinstance(dtype, Placeholder):
                return dtype
            if key not in buffers:
                buffers[key] = bytearray(archive.read(f"{folder}/data/{key}"))
            return numbers(buffers[key], dtype, count)

        return Unpickler(io.BytesIO(archive.read(f"{folder}/data.pkl")), storage).load()


def read_legacy(path: Path):
    """What torch.save wrote before PyTorch 1.6: pickles in a row, then the numbers of all tensors."""
    with open(path, "rb") as file:
        if file.read(len(LEGACY)) != LEGACY:
            raise pickle.UnpicklingError("something else")
        buffers, counts, room = {}, {}, path.stat().st_size

        def storage(identity):
            nonlocal room
            if identity[0] == "module":  # a class, and its source
                return identity[1]
            dtype, key, count, view = parse_storage(identity)
            if key not in buffers:
                room -= count * dtype.itemsize
                if room < 0:
                    raise ValueError("damaged: it holds less than it says")
                buffers[key], counts[key] = bytearray(count * dtype.itemsize), count
            whole = numbers(buffers[key], dtype, count)
            return whole[view[1] : view[1] + view[2]] if view else whole

        for _ in ("version", "the machine"):
            Unpickler(file).load()
        content = Unpickler(file, storage).load()
        if Unpickler(file).load() != sorted(buffers):
            raise ValueError("damaged: the list of its tensors is wrong")
        for key in sorted(buffers):
            count = int.from_bytes(file.read(8), "little")
            if count != counts[key] or file.readinto(buffers[key]) != len(buffers[key]):
                raise ValueError("damaged: it holds less than it says")
        return content


def parse_storage(identity) -> tuple:
    """How a pickle of torch.save names the numbers of a tensor: their type, which ones, how many, and if they
    are a part of others, of which, from where, how many."""
    kind, dtype, key, _, count, *view = identity
    if kind != "storage" or type(key) is not str or type(count) is not int:
        raise ValueError("damaged: no tensor has this name")
    return dtype, key, count, view[0] if view else None


def numbers(buffer: bytearray, dtype: torch.dtype, count: int) -> Tensor:
    return torch.frombuffer(buffer, dtype=dtype, count=count) if count else torch.empty(0, dtype=dtype)


@dataclass(frozen=True)
class Placeholder:
    """Stands in what was read for a class or function, and for whatever it would have made."""

    name: str  # as "argparse.Namespace"


def is_plain(key) -> bool:
    """Whether a dict's key is a number or a text that can stand in a line."""
    if isinstance(key, str):
        return len(key) < 500 and key.isprintable()
    return isinstance(key, float | None) or isinstance(key, int) and key.bit_length() < 64


def make_dict(pairs=()) -> dict:
    return {key: value for key, value in pairs if is_plain(key)}


def make_ordered(pairs=None) -> dict:
    """Of Python 2, which saved an OrderedDict as a list. That is emptied: no file makes many dicts of it."""
    if pairs is None:
        return {}
    if type(pairs) is not list:
        raise pickle.UnpicklingError("no list of pairs")
    made = make_dict(pairs)
    pairs.clear()
    return made


def make_tensor(storage: Tensor, offset: int, size: tuple, stride: tuple, *others) -> Tensor:
    return storage.as_strided(size, stride, offset)  # which looks whether they lie in the storage


def make_parameter(value, *others):
    return value


def make_subclass(make, kind, arguments, state):
    return made_by(make, arguments)


MAKERS = {  # our own functions in place of those that make tensors and plain containers
    "collections.OrderedDict": make_ordered,
    "collections.defaultdict": lambda *default: {},
    "torch._utils._rebuild_tensor": make_tensor,
    "torch._utils._rebuild_tensor_v2": make_tensor,
    "torch._utils._rebuild_parameter": make_parameter,
    "torch._utils._rebuild_parameter_with_state": make_parameter,
    "torch._tensor._rebuild_from_type_v2": make_subclass,
}
STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}
REGISTERED = pickle.EXT1 + pickle.EXT2 + pickle.EXT4  # instructions for classes known by a number
MOST_INSTRUCTIONS = 4_000_000  # of a pickle; a ResNet-50 with the state of AdamW has 26,151
LEGACY = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)  # how files from before PyTorch 1.6 begin


def made_by(make, arguments):
    """The object that a class or function of a file would make; only those of MAKERS are called."""
    if isinstance(make, FunctionType):
        return make(*arguments)
    if isinstance(make, Placeholder):
        return make
    raise pickle.UnpicklingError("neither a class nor a function")


def counted(load):
    """An instruction of a pickle that is followed MOST_INSTRUCTIONS times at most, with all others."""

    def step(unpickler):
        unpickler.left -= 1
        if unpickler.left < 0:
            raise ValueError(f"of more than {MOST_INSTRUCTIONS:,} instructions, which is no checkpoint's")
        load(unpickler)

    return step


class Unpickler(pickle._Unpickler):
    """Python's own machine of a pickle's instructions, without those that import, call or change anything.

    A name of a class or function becomes one of MAKERS, a type of numbers, or a Placeholder. Objects get no
    state; only lists and dicts get items; sets, whose items would be compared, are Placeholders. What is made
    takes no more memory than the file and MOST_INSTRUCTIONS do.

    storage: for names of tensors' numbers, see `parse_storage`.
    """

    def __init__(self, file, storage=None):
        super().__init__(file, encoding="latin1")  # of Python 2, whose text is bytes
        self.persistent_load, self.left = storage, MOST_INSTRUCTIONS

    def find_class(self, module: str, name: str):
        if module in ("torch", "torch.cuda") and name in STORAGES:
            return STORAGES[name]
        whole = f"{module}.{name}"
        return MAKERS.get(whole) or Placeholder(whole if is_plain(whole) else "class without a proper name")

    def _instantiate(self, make, arguments):
        self.append(made_by(make, arguments))

    def make(self):
        arguments = self.stack.pop()
        self._instantiate(self.stack.pop(), arguments)

    def make_with_keywords(self):
        self.stack.pop()
        self.make()

    def build(self):
        self.stack.pop()

    def add_to_list(self, items):
        if type(self.stack[-1]) is list:
            self.stack[-1].extend(items)

    def add_to_dict(self, items):
        if type(self.stack[-1]) is dict:
            self.stack[-1].update(make_dict(zip(items[::2], items[1::2], strict=True)))

    def add_pair(self):
        value, key = self.stack.pop(), self.stack.pop()
        self.add_to_dict([key, value])

    def frozen_set(self):
        self.pop_mark()
        self.append(Placeholder("builtins.frozenset"))

    def dict_of_marked(self):
        items = self.pop_mark()
        self.append(make_dict(zip(items[::2], items[1::2], strict=True)))

    dispatch = {
        **{code: load for code, load in pickle._Unpickler.dispatch.items() if code not in REGISTERED},
        pickle.REDUCE[0]: make,
        pickle.NEWOBJ[0]: make,
        pickle.NEWOBJ_EX[0]: make_with_keywords,
        pickle.BUILD[0]: build,
        pickle.APPEND[0]: lambda self: self.add_to_list([self.stack.pop()]),
        pickle.APPENDS[0]: lambda self: self.add_to_list(self.pop_mark()),
        pickle.SETITEM[0]: add_pair,
        pickle.SETITEMS[0]: lambda self: self.add_to_dict(self.pop_mark()),
        pickle.DICT[0]: dict_of_marked,
        pickle.EMPTY_SET[0]: lambda self: self.append(Placeholder("builtins.set")),
        pickle.ADDITEMS[0]: lambda self: self.pop_mark(),
        pickle.FROZENSET[0]: frozen_set,
        pickle.BYTEARRAY8[0]: pickle._Unpickler.load_binbytes8,
    }
    dispatch = {code: counted(load) for code, load in dispatch.items()}


def other_format(path: str | Path) -> str:
    """What a file that torch.load does not know is, if its first bytes tell, and what to do; else nothing."""
    with open(path, "rb") as file:
        start = file.read(32)
    if start.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS in place of the file; git lfs pull fetches the file itself"
    if start.lstrip()[:1] == b"<":
        return "a web page in place of the file; download it again"
    if start[8:9] == b"{":
        return (
            "a file of safetensors; torch.save(safetensors.torch.load_file(FILE), NEW) makes one that is read"
        )
    if start.startswith(b"\x89HDF"):
        return "an HDF5 file, as Keras writes them; only files of PyTorch are read"
    return ""


def check_intact(path: str | Path) -> None:
    """Raise BadZipFile if bytes of the file have changed, which torch.load does not look at, or if it claims
    to hold more of them than it has."""
    if not zipfile.is_zipfile(path):  # written before PyTorch 1.6: without checksums
        return
    with zipfile.ZipFile(path) as archive:
        if sum(entry.file_size for entry in archive.infolist()) > Path(path).stat().st_size:
            raise zipfile.BadZipFile("damaged: it holds less than it says")
        if damaged := archive.testzip():
            raise zipfile.BadZipFile(f"damaged: wrong checksum of {damaged}")


# ---- What can be used ----------------------------------------------------------------------------


def is_sound(value) -> bool:
    """Whether a value of a checkpoint is a tensor of finite real numbers, all of which the file holds."""
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and value.dtype in NUMBERS
        and value.numel() * value.element_size() <= value.untyped_storage().nbytes()  # not expanded
        and bool(value.isfinite().all())
    )


def is_negative(name: str, value: Tensor) -> bool:
    """Whether a variance or a count is."""
    return name.endswith(("running_var", "num_batches_tracked")) and bool((value < 0).any())


def fits(state, own: dict) -> bool:
    """Whether a state dict from a checkpoint can be one of the same network as `own`: its names, shapes and
    types, finite numbers, no negative variance or count. What is no tensor in `own` is not looked at."""
    if not isinstance(state, dict) or state.keys() != own.keys():
        return False
    tensors = {name: value for name, value in own.items() if isinstance(value, Tensor)}
    return all(
        is_sound(state[name])
        and (state[name].shape, state[name].dtype) == (value.shape, value.dtype)
        and not is_negative(name, state[name])
        for name, value in tensors.items()
    )


# ---- Into an encoder -----------------------------------------------------------------------------


PUBLISHED = (  # torchvision's, that are none of ours
    *("resnet152", "wide_resnet50_2", "wide_resnet101_2"),
    *("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d"),
)


@dataclass
class LoadReport:
    """What `load_encoder_weights` did; str() is one line."""

    path: str
    prefix: str  # before the ResNet's own names in the file
    loaded: int  # tensors
    left_out: list[str]  # names in the file that have no place in the encoder
    note: str = ""

    def __str__(self) -> str:
        where = f" under {self.prefix!r}" if self.prefix else ""
        rest = f", left out {len(self.left_out)} ({self.left_out[0]}, ...)" if self.left_out else ""
        return f"{self.path}: loaded {self.loaded} tensors{where}{rest}{self.note}"


def load_encoder_weights(encoder: Encoder, path: str | Path) -> LoadReport:
    """Load a ResNet's weights from our own or most published files, and say what was done.

    The file may nest the tensors in dicts and put any prefix before the names (MoCo's `module.encoder_q.`,
    mmselfsup's and mmseg's `backbone.`, our checkpoint's `query.encoder.`), number the network's parts as
    nn.Sequential does, and name wrappers in between (`_orig_mod.`); heads are left out. A stem of
    another number of channels is summed (or spread) so that it answers the same to a slice repeated in
    every channel. Into a whitened encoder the last norm goes as a diagonal covariance; a file's IterNorm is
    folded into the convolution before it, unless the encoder has the same.

    Args:
        path: as `weights.weights_file` takes it.

    Raises:
        WeightsError: unreadable, not a ResNet, or one of another architecture. The encoder is then unchanged.
    """
    path = weights_file(path)
    state, prefix, names, note = read_resnet(path)
    own = encoder.state_dict()
    if (shape := block_shape(state)) not in (None, block_shape(own)):
        found = architecture(shape)
        advice = f"; model.arch={found}" if found in ARCHITECTURES else ""
        raise WeightsError(f"{path}: holds {a_resnet(found, shape)}, not a {encoder.arch}{advice}")

    note += fit_stem(state, encoder.in_channels)
    note += fit_last_norm(state, encoder)
    required = [name for name in own if not name.endswith("num_batches_tracked")]
    missing = [name for name in required if name not in state]
    unfit = [name for name in required if name in state and state[name].shape != own[name].shape]
    in_layers = tuple(f"{part}." for part in ("conv1", "bn1", *LAYERS))
    own_norm = f"{encoder.last_norm}."
    more = [n for n in state if n.startswith(in_layers) and n not in own and not n.startswith(own_norm)]
    more = [name for name in more if not name.endswith("num_batches_tracked")]
    if missing or unfit or more:
        found = (
            f"{missing[0]} is missing"
            if missing
            else f"{unfit[0]} is {tuple(state[unfit[0]].shape)} instead of {tuple(own[unfit[0]].shape)}"
            if unfit
            else f"{more[0]} has no place"
        )
        raise WeightsError(f"{path}: not a {encoder.arch} with this norm: {found}")
    fitting = {name: state[name] for name in own if name in state}
    encoder.load_state_dict(fitting, strict=False)
    used = {prefix + name for name in fitting}
    rest = [n for n in names if n not in used and not n.startswith(f"{prefix}{own_norm}")]
    return LoadReport(str(path), prefix, len(fitting), rest, note)


def architecture_of(path: str | Path) -> str | None:
    """The one of ARCHITECTURES that a file of weights holds (see `weights.weights_file`); None for
    another ResNet.

    Raises:
        WeightsError: unreadable, or not a ResNet.
    """
    state, _, _, _ = read_resnet(weights_file(path))
    found = architecture(block_shape(state))
    return found if found in ARCHITECTURES else None


def block_shape(state: dict[str, Tensor]) -> tuple | None:
    """What tells one ResNet from another: whether its blocks are bottlenecks, how many each layer
    has, and the output channels and group size of the first block's first and second convolution."""
    first, second = (state.get(f"layer1.0.conv{i}.weight") for i in (1, 2))
    if first is None or second is None or not first.dim() == second.dim() == 4:
        return None
    blocks = [{name.split(".")[1] for name in state if name.startswith(f"{layer}.")} for layer in LAYERS]
    return "layer1.0.conv3.weight" in state, tuple(map(len, blocks)), len(first), second.shape[1]


def architecture(wanted: tuple | None) -> str | None:
    """The name of the ResNet, ours or torchvision's, of this `block_shape`; None if it is none of them."""
    with torch.device("meta"):
        for name, (network, block, depths) in ARCHITECTURES.items():
            if block_shape(network(block, depths).state_dict()) == wanted:
                return name
        for name in PUBLISHED:
            if block_shape(getattr(published, name)().state_dict()) == wanted:
                return name
    return None


def a_resnet(name: str | None, shape: tuple) -> str:
    if name is not None:
        return f"a {name}"
    bottleneck, depths, channels, _ = shape
    kind = "bottleneck" if bottleneck else "basic"
    return f"a ResNet of {'-'.join(map(str, depths))} {kind} blocks, the first with {channels} channels"


def fit_stem(state: dict[str, Tensor], in_channels: int) -> str:
    """Change conv1 in `state` to `in_channels`; returns what to say of it."""
    kernel = state.get("conv1.weight")
    if kernel is None or kernel.dim() != 4 or kernel.shape[1] == in_channels:
        return ""
    summed = kernel.sum(dim=1, keepdim=True)
    state["conv1.weight"] = summed.expand(-1, in_channels, -1, -1) / in_channels
    return f", stem of {kernel.shape[1]} channels summed to {in_channels}"


def fit_last_norm(state: dict[str, Tensor], encoder: Encoder) -> str:
    """Change the last norm in `state`, BatchNorm or IterNorm, to the encoder's; returns what to say of it.

    IterNorm may have the shapes of its authors' code: an affine of (1, C, 1, 1), a mean of (G, C / G, 1).
    """
    name, note = encoder.last_norm, ""
    norm = encoder.get_submodule(name)
    own = {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
    channels = encoder.channels["layer4"]
    if "running_wm" in own and "running_mean" in own:
        matrix, mean = own["running_wm"], own["running_mean"]
        square = matrix.dim() == 3 and matrix.shape[1] == matrix.shape[2]
        if not square or not len(matrix) * matrix.shape[1] == mean.numel() == channels:
            return ""
        state.update({f"{name}.{key}": own[key].flatten() for key in ("weight", "bias") if key in own})
        if isinstance(norm, IterNorm) and matrix.shape == norm.running_wm.shape:
            state[f"{name}.running_mean"] = mean.view(matrix.shape[:2])
        elif f"{encoder.last_conv}.weight" in state:
            fold_whitening(state, encoder.last_conv, name, matrix)
            note = f", whitening of {name} folded into {encoder.last_conv}"
    if not isinstance(norm, Whitening) or f"{name}.running_var" not in state:
        return note
    mean, variance = state.get(f"{name}.running_mean"), state.pop(f"{name}.running_var")
    if mean is not None and mean.numel() == variance.numel() == channels:
        shape = (norm.num_groups, norm.group_size)
        state[f"{name}.running_mean"] = mean.reshape(shape)
        covariance = torch.diag_embed(variance.reshape(shape))
        if isinstance(norm, ZCAWhitening):
            state[f"{name}.running_cov"] = covariance
        else:
            state[f"{name}.running_wm"] = inverse_sqrt(covariance, norm.eps)
    return note + f", {name} turned into whitening of its variances"
