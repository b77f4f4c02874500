"""`.ci/audit`: vulnerabilities fail it, a database without an answer does not, nothing is hidden."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / ".ci" / "audit"
GOOD = {"name": "good", "version": "1", "vulns": []}
BAD = {
    "name": "bad",
    "version": "2",
    "vulns": [{"id": "CVE-1", "fix_versions": ["3"]}, {"id": "CVE-2", "fix_versions": []}],
}
UNKNOWN = {"name": "unknown", "skip_reason": "not found"}
TRACEBACK = (
    "Traceback ...\nrequests.exceptions.{}: HTTPSConnectionPool(host='x', port=443): Max retries exceeded"
)


def audit(tmp_path, status, said, *packages):
    """Run the script with a pip-audit of this output; return (status, output)."""
    found = json.dumps({"dependencies": packages}) if packages else ""
    fake = tmp_path / "pip-audit"
    fake.write_text(
        f"#!{sys.executable}\nimport sys\nassert '--path' in sys.argv\nprint({found!r})\n"
        f"sys.stderr.write({said!r})\nsys.exit({status})\n"
    )
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    environment = {**os.environ, "PIP_AUDIT": str(fake), "PYTHON": sys.executable}
    done = subprocess.run([SCRIPT], env=environment, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    "status, said, packages, passes, says",
    [
        (0, "", [GOOD], True, "no known vulnerabilities in 1 packages"),
        (0, "", [GOOD, UNKNOWN], True, "NOTICE: the database does not know unknown"),
        (0, "No known vulnerabilities found", [UNKNOWN], True,
         "NOTICE: no audit of vulnerabilities: the database knows none"),
        (1, "Found 2 known vulnerabilities", [GOOD, BAD, UNKNOWN], False, "bad 2: CVE-1; fixed in 3"),
        (1, "Found 2 known vulnerabilities", [BAD], False, "CVE-2; fixed in no version yet"),
        (0, "", [BAD], False, "vulnerabilities in 1 packages"),
        (1, TRACEBACK.format("ConnectionError"), [], True,
         "NOTICE: no audit of vulnerabilities: the database cannot be reached"),
        (1, TRACEBACK.format("ProxyError"), [], True, "cannot be reached"),
        (1, "Traceback ...\nKeyError: 'x'", [], False, "pip-audit failed with status 1: KeyError"),
        (2, "unrecognized arguments: --path", [], False, "pip-audit failed with status 2"),
        (0, "", [], False, "pip-audit failed with status 0"),
        (1, "strange", [GOOD], False, "named no vulnerability"),
    ],
)  # fmt: skip
def test_what_is_found_decides(tmp_path, status, said, packages, passes, says):
    code, output = audit(tmp_path, status, said, *packages)
    assert (code == 0) == passes and says in output, output
