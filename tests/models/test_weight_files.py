"""Files of weights: each kind comes out as its own reader gives it; broken, strange and harmful ones are one line."""

import collections
import os
import pickle
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from gesso.errors import InputError
from gesso.models.pickles import Opaque
from gesso.models.weight_files import read_arrays


class Harm:
    def __reduce__(self) -> Any:
        return os.system, ("true",)


def tensors() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    base = torch.randn(4, 6, generator=g)
    whole = {
        "float": base,
        "turned": base.t(),
        "part": base[1:3, ::2],
        "parameter": nn.Parameter(torch.randn(3, generator=g)),
        "one": torch.tensor(3),
        "empty": torch.zeros(0, 5),
        "channels_last": torch.randn(2, 3, 4, 5, generator=g).to(memory_format=torch.channels_last),
    }
    kinds = ("float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
    return whole | {kind: torch.arange(5).to(getattr(torch, kind)) for kind in kinds}


def same(found: Any, wanted: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        assert type(found[name]) is torch.Tensor and not found[name].requires_grad
        assert found[name].dtype == value.dtype and found[name].stride() == value.stride(), name
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("new", [True, False], ids=["zip", "before 1.6"])
@pytest.mark.parametrize("protocol", [2, 4])
def test_files_of_torch(tmp_path, new, protocol):
    wanted = tensors()
    value = {"state_dict": collections.OrderedDict(wanted), "meta": {"CLASSES": ("cat", "dog"), "epoch": 3}}
    path = tmp_path / "w.pth"
    torch.save(value, path, _use_new_zipfile_serialization=new, pickle_protocol=protocol)
    found = read_arrays(path)
    same(found["state_dict"], wanted)
    assert found["meta"] == value["meta"]
    storages = {found["state_dict"][name].untyped_storage().data_ptr() for name in ("float", "turned", "part")}
    assert len(storages) == 1  # tensors that share memory still do


@pytest.mark.parametrize("new", [True, False], ids=["zip", "before 1.6"])
def test_a_state_dictionary_of_a_module(tmp_path, new):
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    torch.save(module.state_dict(), tmp_path / "w.pth", _use_new_zipfile_serialization=new)
    same(read_arrays(tmp_path / "w.pth"), dict(module.state_dict()))


def test_a_file_in_the_middle_of_training(tmp_path):
    module = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    module(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 2])
    torch.save(
        {"model": module.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()},
        tmp_path / "w.pth",
    )
    found = read_arrays(tmp_path / "w.pth")
    same(found["model"], dict(module.state_dict()))
    assert found["optimizer"]["param_groups"][0]["lr"] == 0.1
    assert isinstance(found["schedule"]["milestones"], Opaque)


def test_pickles_of_arrays_and_safetensors(tmp_path):
    arrays = {"conv.weight": np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)}
    (tmp_path / "w.pkl").write_bytes(pickle.dumps({"model": arrays, "__author__": "somebody"}))
    found = read_arrays(tmp_path / "w.pkl")
    assert found["__author__"] == "somebody"
    same(found["model"], {name: torch.from_numpy(value) for name, value in arrays.items()})
    plain = {name: value.detach().clone().contiguous() for name, value in tensors().items()}
    save_file(plain, tmp_path / "w.safetensors")
    found = read_arrays(tmp_path / "w.safetensors")
    assert found.keys() == plain.keys() and all(torch.equal(found[name], value) for name, value in plain.items())


@pytest.mark.parametrize("write", ["zip", "before 1.6", "pickle"])
def test_files_that_hold_code_are_refused_with_one_line(tmp_path, write):
    value = {"model": {"w": torch.ones(2)}, "meta": {"hooks": [Harm()]}}
    path = tmp_path / "w.pth"
    if write == "pickle":
        path.write_bytes(pickle.dumps({"model": {"w": np.ones(2)}, "meta": [Harm()]}))
    else:
        torch.save(value, path, _use_new_zipfile_serialization=write == "zip")
    with pytest.raises(InputError) as caught:
        read_arrays(path)
    assert str(caught.value) == (
        f"{path}: the file holds code (posix.system), not weights. Do not load it with torch or pickle."
    )


def test_a_program_of_torchscript_is_refused(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "w.pt")
    with pytest.raises(InputError, match=r"holds code \(a program of TorchScript's\)"):
        read_arrays(tmp_path / "w.pt")


def whole_file(kind: str, folder: Path) -> Path:
    path = folder / "whole"
    if kind == "pickle":
        path.write_bytes(pickle.dumps({"model": {"w": np.arange(3000.0)}}))
    elif kind == "safetensors":
        save_file({"w": torch.arange(3000.0)}, path)
    else:
        torch.save({"w": torch.arange(3000.0)}, path, _use_new_zipfile_serialization=kind == "zip")
    return path


@pytest.mark.parametrize("kind", ["zip", "before 1.6", "pickle", "safetensors"])
def test_files_that_break_off_are_refused_with_one_line(tmp_path, kind):
    whole = whole_file(kind, tmp_path).read_bytes()
    for cut in (20, len(whole) // 3, len(whole) - 50, len(whole) - 1):
        path = tmp_path / "cut.pth"
        path.write_bytes(whole[:cut])
        with pytest.raises(
            InputError, match=r"cut\.pth: the file is broken or breaks off .*\. Fetch it once more\.$"
        ) as e:
            read_arrays(path)
        assert "\n" not in str(e.value)


def test_changed_numbers_in_a_zip_file_are_noticed(tmp_path):
    path = whole_file("zip", tmp_path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"broken or breaks off .*CRC"):
        read_arrays(path)


def test_tensors_larger_than_their_memory_are_refused(tmp_path):
    path = tmp_path / "w.pth"
    torch.save({"w": torch.zeros(1).expand(10**6)}, path)
    with pytest.raises(InputError, match="a tensor is larger than its memory"):
        read_arrays(path)
    torch.save({"w": torch.zeros(8)}, path)
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(tmp_path / "short.pth", "w") as target:
        for name in source.namelist():
            data = source.read(name)
            target.writestr(name, data[:4] if "/data/" in name else data)
    with pytest.raises(InputError, match="another size than its data"):
        read_arrays(tmp_path / "short.pth")


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "the file is empty. Give a .pth file"),
        (b"<html>not found</html>", "no file of weights that is known here. Give a .pth file"),
        (b"\x89PNG\r\n\x1a\n", "no file of weights that is known here"),
        (b"version https://git-lfs.github.com/spec/v1\n", "no file of weights that is known here"),
        (b"PK\x03\x04", "broken or breaks off"),
    ],
)
def test_other_files_are_refused(tmp_path, data, what):
    (tmp_path / "w.pth").write_bytes(data)
    with pytest.raises(InputError, match=what):
        read_arrays(tmp_path / "w.pth")


def test_other_zip_files_and_folders_and_nothing(tmp_path):
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("a/b.txt", "c")
    with pytest.raises(InputError, match=r"without torch's data\.pkl"):
        read_arrays(tmp_path / "other.zip")
    with pytest.raises(InputError, match=r"Is a directory\. Check the path"):
        read_arrays(tmp_path)
    with pytest.raises(InputError, match=r"No such file or directory\. Check the path"):
        read_arrays(tmp_path / "none.pth")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the size of a process is counted in another unit elsewhere")
@pytest.mark.parametrize("kind", ["zip", "before 1.6", "pickle"])
def test_large_arrays_take_their_memory_once(tmp_path, kind):
    path, megabytes = tmp_path / "large", 400
    count = megabytes * 2**18
    if kind == "pickle":
        path.write_bytes(pickle.dumps({"model": {"w": np.ones(count, np.float32)}}))
    else:
        torch.save({"w": torch.ones(count)}, path, _use_new_zipfile_serialization=kind == "zip")
    code = (
        "import resource, sys; from pathlib import Path; from gesso.models.weight_files import read_arrays;"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; read_arrays(Path(sys.argv[1]));"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1.2 * megabytes * 1024
