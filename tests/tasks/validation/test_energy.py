import pytest

from tasks.validation.energy import Meter
from tests.tasks.validation.nvml import Nvml


def package(root, name, microjoules):
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "max_energy_range_uj").write_text("1000000\n")
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    return folder / "energy_uj"


def no_gpu():
    return None


def test_joules_are_those_of_all_packages_also_when_a_counter_wraps(tmp_path):
    first = package(tmp_path, "intel-rapl:0", 900_000)
    second = package(tmp_path, "intel-rapl:1", 100_000)
    package(tmp_path, "intel-rapl:0:0", 5)  # a part of the first package
    meter = Meter(tmp_path, no_gpu)
    assert meter.measures
    assert meter.says == "RAPL of 2 packages"
    before = meter.joules()
    second.write_text("350000")
    assert meter.joules() - before == pytest.approx(0.25)
    first.write_text("100000")  # past a million
    assert meter.joules() - before == pytest.approx(0.25 + 0.2)


def test_gpus_count_too(tmp_path):
    nvml = Nvml()
    meter = Meter(tmp_path / "none", lambda: nvml)
    before = meter.joules()
    nvml.millijoules += 1500
    assert meter.joules() - before == pytest.approx(2 * (1.5 + 2))  # each look at the counter adds a joule
    assert meter.says == "NVML of 2 GPUs"


def test_a_gpu_that_counts_no_energy_is_left_out(tmp_path):
    meter = Meter(tmp_path / "none", lambda: Nvml(counts_energy=False))
    assert not meter.measures
    assert meter.says.endswith("and no GPU counts energy")


def test_without_a_counter_the_reason_is_said(tmp_path):
    assert "there is no" in Meter(tmp_path / "none", no_gpu).says
    assert "holds no RAPL package" in Meter(tmp_path, no_gpu).says
    package(tmp_path, "intel-rapl:0", 1).unlink()
    meter = Meter(tmp_path, no_gpu)
    assert "may be read by root alone" in meter.says
    assert not meter.measures
    assert meter.joules() == 0
