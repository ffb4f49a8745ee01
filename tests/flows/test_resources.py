from types import SimpleNamespace

from flows.check import _words
from flows.resources import needs


def test_stages_that_time_want_the_machine_alone_and_engines_on_a_gpu_want_one():
    tensorrt = SimpleNamespace(engine="tensorrt")
    assert needs("measure-speed", "measure-speed", {"bundles": {"int8/openvino-float32": None}}).alone
    assert not needs("measure-speed", "measure-speed", {"bundles": {"int8/openvino-float32": None}}).gpu
    assert needs("measure-speed", "measure-speed", {"bundles": {"int8/tensorrt-float16": None}}).gpu
    assert needs("compile", "int8/tensorrt compile", {"engine": tensorrt}).gpu
    assert needs("measure-tpot", "mixed measure-tpot", {"engine": tensorrt}).gpu
    quality = needs("measure-quality", "int8/onnxruntime measure-quality", {})
    assert (quality.gpu, quality.alone) == (False, False)
    assert needs("prepare-data", "prepare-data", {}).cores == 1


def test_the_plan_says_what_a_stage_needs():
    found = needs("measure-speed", "measure-speed", {"bundles": {"a/tensorrt": None}}, memory_mib=1234.5)
    assert _words(found).endswith("1,234 MiB, GPU, the machine alone")
