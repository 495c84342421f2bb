"""The file in which an artifact keeps the weights of its phases."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import torch
from torch import nn

from tgate_fx.artifact import weights_file


def tensors() -> dict[str, torch.Tensor]:
    """One of each form that inductor's constants have."""
    noise = torch.Generator().manual_seed(0)
    base = torch.randn(6, 10, generator=noise)
    return {
        "dense": base,
        "parameter": nn.Parameter(torch.randn(7, generator=noise)),
        "part of a storage": base[2:5, 1:4],
        "transposed": base.T,
        "channels last": torch.randn(2, 3, 4, 5, generator=noise).to(memory_format=torch.channels_last),
        "bfloat16": torch.randn(3, 5, generator=noise).bfloat16(),
        "whole numbers": torch.arange(9),
        "one number": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
        "packed": torch.randn(8, 16, generator=noise).to_mkldnn(),
    }


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    expected = tensors()
    with (tmp_path / "file").open("wb") as file:
        writer = weights_file.WeightsWriter(file, ())
        phases = [writer.write({name: (tensor, tensor)}) for name, tensor in expected.items()]
    got = {name: tensor for phase in weights_file.mapped(tmp_path / "file", phases) for name, tensor in phase.items()}
    assert list(got) == list(expected)
    for name, tensor in expected.items():
        assert (got[name].dtype, got[name].shape, got[name].layout) == (tensor.dtype, tensor.shape, tensor.layout)
        if tensor.is_mkldnn:
            assert torch.equal(got[name].to_dense(), tensor.to_dense())
            assert torch.ops.mkldnn.data_ptr(got[name]) % 64 == 0
        else:
            assert torch.equal(got[name], tensor)
            assert got[name].stride() == tensor.stride()
            assert (got[name].data_ptr() - got[name].storage_offset() * got[name].element_size()) % 64 == 0


def test_packed_weights_outlive_what_else_reads_the_file(tmp_path: Path) -> None:
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    with (tmp_path / "file").open("wb") as file:
        writer = weights_file.WeightsWriter(file, ())
        entries = writer.write({"packed": (weight.to_mkldnn(), weight.to_mkldnn())})
    ((_, packed),) = weights_file.mapped(tmp_path / "file", [entries])[0].items()
    assert torch.equal(packed.to_dense(), weight)
    is_there = weakref.ref(packed)
    del packed
    gc.collect()
    assert is_there() is None  # nor are they kept for ever


def test_the_same_bytes_are_written_once(tmp_path: Path) -> None:
    weight, other = torch.ones(100), torch.zeros(100)
    with (tmp_path / "file").open("wb") as file:
        writer = weights_file.WeightsWriter(file, ())
        first = writer.write({"a": (weight, weight), "b": (other, other)})
        second = writer.write({"c": (weight.clone(), weight.clone().view(10, 10))})
    assert (tmp_path / "file").stat().st_size < 3 * 400
    assert first["a"]["file_offset"] == second["c"]["file_offset"]
    ((c,),) = [list(phase.values()) for phase in weights_file.mapped(tmp_path / "file", [second])]
    assert torch.equal(c, weight.view(10, 10))
