"""`python -m tests.audit`: the installed dependencies against the databases of known vulnerabilities (pip-audit).

Ends with 0 only when every dependency was looked up and none is known to be vulnerable. Without a network nothing is
looked up: it says so and ends with 3, for what was not audited is not clean. `--offline` leaves it out and says so.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import distributions

OWN = frozenset({"corral", "corral-hello", "corral-llama"})
VULNERABLE, NOT_AUDITED = 1, 3


def main() -> int:
    """The exit status."""
    installed = {each.metadata["Name"].lower() for each in distributions()} - OWN
    if "--offline" in sys.argv[1:]:
        print(f"S16: --offline: {len(installed)} dependencies were NOT audited")
        return 0
    command = [
        sys.executable,
        "-m",
        "pip_audit",
        "--local",
        "--skip-editable",
        "--progress-spinner",
        "off",
        "-f",
        "json",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    try:
        found = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        print(f"S16: pip-audit could not reach its data: NOTHING was audited\n{done.stderr.strip()[-500:]}")
        return NOT_AUDITED
    unknown = sorted(each["name"] for each in found if "skip_reason" in each and each["name"] not in OWN)
    vulnerable = [(each["name"], each["version"], fault["id"], fault["fix_versions"])
                  for each in found for fault in each.get("vulns", ())]  # fmt: skip
    for name, version, fault, fixed in vulnerable:
        print(f"  {name} {version}: {fault}, fixed in {', '.join(fixed) or 'no release'}")
    print(f"S16: {len(found)} dependencies, {len(vulnerable)} known vulnerabilities, {len(unknown)} not audited")
    if unknown:
        print(
            f"  the index has no data of {', '.join(unknown[:10])}{' …' if len(unknown) > 10 else ''}: is it a mirror?"
        )
    return VULNERABLE if vulnerable else NOT_AUDITED if unknown else 0


if __name__ == "__main__":
    sys.exit(main())
