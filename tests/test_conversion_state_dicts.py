"""Checkpoint files: what is read, and what is refused, by which words, without running anything in it."""

import gzip
import os
import pickle
import zipfile

import pytest
import safetensors.torch
import torch

from cdm_diffusers.conversion import read_state_dict


WEIGHTS = {"a.weight": torch.arange(6000.0).reshape(60, 100), "a.bias": torch.ones(60)}


class RunsCode:
    """Unpickling it would make a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def write(path, content):
    path.write_bytes(content)
    return path


def saved(path, content=WEIGHTS, **options):
    torch.save(content, path, **options)
    return path


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}])
def test_torch_files_of_both_formats(tmp_path, options):
    state_dict = read_state_dict(saved(tmp_path / "model.pt", **options))
    assert list(state_dict) == list(WEIGHTS)
    assert all(torch.equal(state_dict[name], WEIGHTS[name]) for name in WEIGHTS)


def test_safetensors(tmp_path):
    safetensors.torch.save_file(WEIGHTS, tmp_path / "model.safetensors")
    state_dict = read_state_dict(str(tmp_path / "model.safetensors"))
    assert all(torch.equal(state_dict[name], WEIGHTS[name]) for name in WEIGHTS)


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}])
@pytest.mark.parametrize("hidden", [False, True])
def test_pickles_that_run_code_are_refused(tmp_path, options, hidden):
    trap = RunsCode(tmp_path / "trap")
    content = WEIGHTS | {"b": trap} if hidden else trap
    path = saved(tmp_path / "model.pt", content, **options)
    with pytest.raises(ValueError, match=r"model.pt is refused: .* asks for .*mkdir"):
        read_state_dict(path)
    assert not (tmp_path / "trap").exists()


def test_plain_pickles_are_refused_too(tmp_path):
    path = write(tmp_path / "model.pt", pickle.dumps(RunsCode(tmp_path / "trap")))
    with pytest.raises(ValueError, match=r"model.pt (is refused|is not a checkpoint)"):
        read_state_dict(path)
    assert not (tmp_path / "trap").exists()


def test_whole_networks_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"is refused: .*Linear"):
        read_state_dict(saved(tmp_path / "model.pt", torch.nn.Linear(2, 2)))


@pytest.mark.filterwarnings("ignore:.*looks like a TorchScript archive")
def test_archives_of_other_kinds_are_refused(tmp_path):
    """Compiled networks, which torch would run, and compressed archives; nobody is told to switch safety off."""
    with zipfile.ZipFile(tmp_path / "compiled.pt", "w") as archive:
        for name in ("constants.pkl", "data.pkl", "version"):  # by the first of them torch knows TorchScript
            archive.writestr(f"compiled/{name}", b"3\n")
    compressed = write(tmp_path / "compressed.pt", gzip.compress(saved(tmp_path / "model.pt").read_bytes()))
    for path in (tmp_path / "compiled.pt", compressed):
        with pytest.raises(ValueError, match=f"{path.name} is not a .*checkpoint") as error:
            read_state_dict(path)
        assert "In PyTorch" not in str(error.value) and "`False`" not in str(error.value)


@pytest.mark.parametrize("kept", [0.2, 0.9, 0.999])
@pytest.mark.parametrize("kind", ["zip", "old", "safetensors"])
def test_files_cut_off(tmp_path, kind, kept):
    path = tmp_path / "model.pt"
    if kind == "safetensors":
        safetensors.torch.save_file(WEIGHTS, path)
    else:
        saved(path, _use_new_zipfile_serialization=kind == "zip")
    content = path.read_bytes()
    with pytest.raises(ValueError, match=r"model.pt is .*cut off"):
        read_state_dict(write(path, content[: int(kept * len(content))]))


def test_files_with_a_hole(tmp_path):
    """As a download in several pieces leaves them: the end is there, the middle is zeros."""
    path = saved(tmp_path / "model.pt")
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 5000] = bytes(5000)
    with pytest.raises(ValueError, match=r"model.pt is damaged: the checksum"):
        read_state_dict(write(path, bytes(content)))


def packed_again(path, source, method, first=zipfile.ZIP_STORED):
    """The archive `source` with its entries compressed, but for the first."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w") as new:
        for number, entry in enumerate(old.infolist()):
            new.writestr(entry.filename, old.read(entry), method if number else first)
    return path


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_archives_that_were_packed_again(tmp_path, method):
    """Compressed entries are no tensors to map; stored ones lie elsewhere than torch would have put them."""
    weights = WEIGHTS | {"int8": torch.arange(-100, 100, dtype=torch.int8), "half": torch.randn(7).half()}
    path = packed_again(tmp_path / "model.pt", saved(tmp_path / "plain.pt", weights), method)
    state_dict = read_state_dict(path)
    assert list(state_dict) == list(weights)
    assert all(torch.equal(state_dict[name], weights[name]) for name in weights)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_archives_that_torch_cannot_unpack(tmp_path, method):
    path = packed_again(tmp_path / "model.pt", saved(tmp_path / "plain.pt"), method)
    with pytest.raises(ValueError, match=r"model.pt .* compressed by a method that torch does not read: unpack it"):
        read_state_dict(path)


def test_encrypted_archives(tmp_path):
    """Bit 0 of an entry's flags, in both of its headers, says so."""
    content = bytearray(saved(tmp_path / "model.pt").read_bytes())
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        place = content.find(signature)
        while place >= 0:
            content[place + flags] |= 1
            place = content.find(signature, place + 1)
    with pytest.raises(ValueError, match=r"model.pt is an encrypted archive: unpack it"):
        read_state_dict(write(tmp_path / "model.pt", bytes(content)))


def test_tensors_without_numbers(tmp_path):
    with pytest.raises(ValueError, match=r"model.pt has names and shapes, but no numbers \('a' is on the meta device"):
        read_state_dict(saved(tmp_path / "model.pt", {"a": torch.empty(3, device="meta")}))


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html>\n<html>not found</html>", "is a web page or a server's error message"),
        (b'\xef\xbb\xbf<?xml version="1.0"?><Error><Code>BlobNotFound</Code></Error>', "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "is a Git LFS pointer"),
        (b"some text that is no checkpoint", "is not a "),
        (bytes(4000), "is not a "),
    ],
)
def test_other_things_than_checkpoints(tmp_path, content, message):
    with pytest.raises(ValueError, match=f"model.pt {message}"):
        read_state_dict(write(tmp_path / "model.pt", content))


@pytest.mark.parametrize(
    "name, message",
    [
        ("pytorch_model-00001-of-00003.bin", "is one part of a sharded checkpoint"),
        ("model.safetensors.index.json", "is one part of a sharded checkpoint"),
        ("64x64_diffusion.pt.crdownload", "is an unfinished download"),
    ],
)
def test_names_that_tell(tmp_path, name, message):
    with pytest.raises(ValueError, match=f"{name} {message}"):
        read_state_dict(saved(tmp_path / name))


@pytest.mark.parametrize(
    "content, message",
    [
        ([torch.ones(2)], "holds a list"),
        ({}, "holds a dict"),
        ({"state_dict": WEIGHTS, "epoch": 3}, "its entry 'state_dict' is a dict"),
        ({0: torch.ones(2)}, "is not a plain state dict: its entry 0"),
        ({"epoch": 3, "optimizer": {}}, "holds the state of an optimizer: .*_gen.pth"),
    ],
)
def test_other_contents_than_state_dicts(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        read_state_dict(saved(tmp_path / "model.pt", content))


def test_paths(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"`checkpoint` is .*missing.pt', which is not there"):
        read_state_dict(tmp_path / "missing.pt")
    with pytest.raises(ValueError, match="is a folder"):
        read_state_dict(tmp_path)
