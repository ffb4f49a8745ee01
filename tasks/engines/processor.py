"""The processor, as Linux tells it."""

from pathlib import Path


def cpuinfo() -> dict[str, str]:
    """The fields of the first core in /proc/cpuinfo, "model name" and "flags" among them; none on other systems."""
    file = Path("/proc/cpuinfo")
    if not file.exists():
        return {}
    lines = file.read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
