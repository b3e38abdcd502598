import numpy as np
import pytest
from scipy.io import savemat

from gesso.data.readers.mat import read_mat
from gesso.errors import DataError


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("version", ["4", "5"])
def test_variables(tmp_path, version, compressed):
    savemat(tmp_path / "a.mat", {"x": np.arange(3), "y": 7, "z": np.eye(2)}, format=version, do_compression=compressed)
    z, x = read_mat(tmp_path / "a.mat", "z", "x")
    assert x.tolist() == [0, 1, 2] and z.shape == (2, 2)


def test_files_of_another_kind(tmp_path):
    with pytest.raises(DataError, match=r"a\.mat: the file is missing"):
        read_mat(tmp_path / "a.mat", "x")
    file = tmp_path / "a.mat"
    head = b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM"
    for data, message in ((b"", "no MATLAB file"), (b"text" * 99, "no MATLAB file"), (head, "version 7.3")):
        file.write_bytes(data)
        with pytest.raises(DataError, match=message):
            read_mat(file, "x")
    savemat(file, {"x": np.arange(5000)}, do_compression=True)
    whole = file.read_bytes()
    for end in (150, len(whole) // 2, len(whole) - 3):
        file.write_bytes(whole[:end])
        with pytest.raises(DataError, match="no MATLAB file"):
            read_mat(file, "x")
    savemat(file, {"x": 1})
    with pytest.raises(DataError, match="the variable 'y' is missing"):
        read_mat(file, "x", "y")
