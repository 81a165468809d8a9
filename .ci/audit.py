"""Known vulnerabilities of everything that is installed here, asked of osv.dev by pip-audit: some, none, or not known.

Exit codes: 0 all packages were asked about and nothing is known against them; 1 something is, or a package could not be
asked about; 75 the service could not be reached, or did not answer sensibly. `--allow-unreachable` makes a 0 of the 75,
for machines without a network, and says just as loudly that nothing was audited.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

NOT_KNOWN = 75
"""As EX_TEMPFAIL of sysexits.h: to be tried again."""


def asked(url: str | None, requirement: Path | None) -> tuple[list[dict[str, Any]], str]:
    """What pip-audit found for every package, and where it found nothing out, its last words."""
    command = [sys.executable, "-m", "pip_audit", "--vulnerability-service", "osv", "--progress-spinner", "off"]
    command += ["--osv-url", url] if url else []
    if requirement is not None:
        command += ["--requirement", str(requirement), "--no-deps", "--disable-pip"]
    else:
        command += ["--skip-editable"]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        done = subprocess.run(
            [*command, "--format", "json", "--output", str(report)], capture_output=True, text=True, check=False
        )
        try:
            return json.loads(report.read_text())["dependencies"], ""
        except (OSError, ValueError, KeyError):
            words = [line for line in done.stderr.splitlines() if line.strip()]
            return [], words[-1] if words else f"pip-audit ended with status {done.returncode} and said nothing"


def verdict(found: list[dict[str, Any]], words: str) -> tuple[int, list[str]]:
    """The exit code and what to print."""
    # The project itself is no dependency, and is on no index before its first release.
    packages = [each for each in found if each["name"] != "lora-da-core"]
    lines = []
    for package in packages:
        for entry in package.get("vulns", ()):
            fixed = ", ".join(entry["fix_versions"]) or "no release yet"
            lines.append(f"{package['name']} {package['version']}: {entry['id']}, fixed in {fixed}")
    if lines:
        return 1, [*lines, f"AUDIT FAILED: {len(lines)} known vulnerabilities in {len(packages)} packages"]
    skipped = [f"{each['name']} ({each['skip_reason']})" for each in packages if "skip_reason" in each]
    if skipped:
        return 1, [f"NOT AUDITED: {len(skipped)} of {len(packages)} packages: {', '.join(skipped)}"]
    if not packages:
        return NOT_KNOWN, [f"NOT AUDITED: the advisory service could not be asked: {words or 'no packages were found'}"]
    return 0, [f"audited: nothing is known against any of {len(packages)} packages"]


def main() -> int:
    """Ask, print, and return the exit code."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--allow-unreachable", action="store_true", help="end with 0 where nothing could be asked")
    arguments.add_argument("--requirement", type=Path, help="audit this list of pinned releases, not what is installed")
    arguments.add_argument("--osv-url", help="another service that speaks OSV's API")
    given = arguments.parse_args()
    code, lines = verdict(*asked(given.osv_url, given.requirement))
    print("\n".join(lines), flush=True)
    return 0 if code == NOT_KNOWN and given.allow_unreachable else code


if __name__ == "__main__":
    sys.exit(main())
