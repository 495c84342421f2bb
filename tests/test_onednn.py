"""Linear layers of frozen graphs go to oneDNN on AMD's processors, and to inductor's choice elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._inductor.fx_passes import mkldnn_fusion
from torch._inductor.utils import run_and_get_code

from tgate_fx.compiled import onednn
from tgate_fx.compiled.settings import CompileSettings
from tgate_fx.compiled.variant import Variant

has_both = torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()
pytestmark = pytest.mark.skipif(not has_both, reason="this torch has oneDNN or MKL, not both")


@pytest.mark.inductor
@pytest.mark.parametrize(("vendor", "used"), [("AuthenticAMD", "mkldnn"), ("GenuineIntel", "mkl"), ("", "mkl")])
def test_which_library_computes_linear_layers(monkeypatch: pytest.MonkeyPatch, vendor: str, used: str) -> None:
    monkeypatch.setattr(onednn, "cpuinfo", {"vendor_id": vendor}.get)
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8, bias=False)).requires_grad_(False)
    inputs = torch.randn(4, 16)
    inductors = mkldnn_fusion._get_mkldnn_device_op
    variant = Variant(lambda x: layers(x), "layers", CompileSettings(), torch.device("cpu"))
    with torch.no_grad():
        output, (code, *_) = run_and_get_code(variant, inputs)
        assert torch.allclose(output, layers(inputs), atol=1e-5)
    calls = {"mkldnn": "mkldnn._linear_pointwise", "mkl": "mkl._mkl_linear"}
    assert [name for name, call in calls.items() if call in code] == [used]
    assert mkldnn_fusion._get_mkldnn_device_op is inductors


def test_inductor_keeps_its_choice_where_it_is_written_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    class Otherwise(mkldnn_fusion.CpuMkldnnDeviceOp):
        def pack_linear(self, graph: object, library: str) -> None:
            raise AssertionError

    monkeypatch.setattr(onednn, "cpuinfo", lambda _: "AuthenticAMD")
    monkeypatch.setattr(mkldnn_fusion, "CpuMkldnnDeviceOp", Otherwise)
    inductors = mkldnn_fusion._get_mkldnn_device_op
    with onednn.onednn_on_amd():
        assert mkldnn_fusion._get_mkldnn_device_op is inductors


def test_other_devices_keep_inductors_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "cpuinfo", lambda _: "AuthenticAMD")
    with onednn.onednn_on_amd():
        assert isinstance(mkldnn_fusion._get_mkldnn_device_op("xpu"), mkldnn_fusion.XpuMkldnnDeviceOp)
        with pytest.raises(RuntimeError, match="cuda"):
            mkldnn_fusion._get_mkldnn_device_op("cuda")
