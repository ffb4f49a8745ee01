"""One check, in the process that `examine` starts for it: its findings go to standard output as JSON."""

import os
import sys
import time

from infra.doctor.examination import CHECKS, FINDINGS


def main() -> None:
    """Run the check that is named on the command line."""
    out = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # libraries talk
    started_at, found = time.monotonic(), []
    for finding in CHECKS[sys.argv[1]]():
        found.append(finding.model_copy(update={"elapsed_s": round(time.monotonic() - started_at, 3)}))
        started_at = time.monotonic()
    with os.fdopen(out, "wb") as stream:
        stream.write(FINDINGS.dump_json(found))


if __name__ == "__main__":
    main()
