import subprocess
import sys
from pathlib import Path

SPEAKS = """
import sys
from infra.console import console
sys.stdin.readline()
console.print("to nobody")
console.print("again")
print("went on")
"""


def test_what_runs_goes_on_when_nobody_listens_any_more():
    speaker = subprocess.Popen(
        [sys.executable, "-c", SPEAKS],
        cwd=Path(__file__).parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    speaker.stderr.close()
    speaker.stderr = None
    assert speaker.communicate("now\n", timeout=60)[0] == "went on\n"
    assert speaker.returncode == 0
